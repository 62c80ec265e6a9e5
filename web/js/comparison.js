// SLA2 Compare: the measured numbers, frames of both videos, and the button that takes over the break-even length.
import { frameSlider } from "./frame_slider.js";
import { el, panelOf } from "./panel.js";
import { upstream } from "./graph.js";
import { setByUser, widgetOf } from "./widgets.js";
import { fromServer, t } from "./texts.js";

export function showComparison(node, output) {
  const data = output.sla2_comparison?.[0];
  if (!data) return;
  const panel = panelOf(node, 360);
  const rows = data.rows.map(([name, value]) => el("tr", {}, el("th", { scope: "row", text: fromServer(name) }), el("td", { text: fromServer(value) })));
  const frames = output.sla2_frames?.[0];
  const said = el("p", { class: "sla2-quiet", role: "status" });
  panel.show(
    el("p", { class: "sla2-head", text: fromServer(data.headline) }),
    el("table", {}, el("tbody", {}, ...rows)),
    ...(frames ? [frameSlider(frames)] : []),
    ...(data.break_even ? [takeOver(node, data.break_even, said), said] : []),
  );
}

function takeOver(node, tokens, said) {
  const button = el("button", { type: "button", text: t`Set minimum_tokens to ${tokens}` });
  button.addEventListener("click", () => {
    const target = upstream(node, "SLA2ApplyAttention");
    const widget = widgetOf(target, "minimum_tokens");
    if (!widget) {
      said.textContent = t`There is no SLA2 Apply Attention on this node's MODEL wire in this graph.`;
      return;
    }
    setByUser(target, widget, tokens);
    said.textContent = t`minimum_tokens of ${target.title} is now ${tokens}.`;
  });
  return el("div", { class: "sla2-row" }, button);
}
