// The same frame of two videos over each other: a slider shows dense to its left and SLA2 to its right.
import { fileURL } from "./files.js";
import { el } from "./panel.js";
import { t } from "./texts.js";

// numbers: of the frames; dense, sla2: a file for each of them
export function frameSlider({ numbers, dense, sla2 }) {
  const images = ["dense", "SLA2"].map((alt) => el("img", { alt, draggable: false }));
  const split = el("input", { type: "range", min: 0, max: 100, step: 1, "aria-label": t`dense to the left, SLA2 to the right` });
  const box = el("div", { class: "sla2-frames" }, ...images, split);
  const caption = el("p", { class: "sla2-quiet" });
  const frame = el("input", { type: "range", min: 0, max: numbers.length - 1, step: 1, value: 0, "aria-label": t`frame` });

  function show() {
    const chosen = Number(frame.value);
    images[0].src = fileURL(dense[chosen]);
    images[1].src = fileURL(sla2[chosen]);
    caption.textContent = t`left: dense, right: SLA2; frame ${numbers[chosen]} of ${numbers.at(-1)}`;
  }

  images[1].addEventListener("error", () => {
    caption.textContent = t`the frames' files are gone (ComfyUI empties its temporary folder at start): run again`;
  });
  split.addEventListener("input", () => box.style.setProperty("--sla2-split", `${split.value}%`));
  frame.addEventListener("input", show);
  for (const slider of [split, frame]) {
    slider.addEventListener("pointerdown", (event) => event.stopPropagation()); // a Vue node would be dragged
  }
  show();
  const frames = el("label", {}, el("span", { text: t`frame` }), frame);
  return el("div", {}, box, caption, ...(numbers.length > 1 ? [frames] : []));
}
