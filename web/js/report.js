// SLA2 Report: a bar per layer, and the routing map of a layer and a step.
import { fileURL } from "./files.js";
import { el, panelOf, svg } from "./panel.js";
import { fromServer, t } from "./texts.js";

const WIDTH = 320;
const BARS = 70;
const MAP = 240;
const LARGE_ERROR = 0.3; // attention error from which on a bar has the other colour entirely

export function showReport(node, output) {
  const data = output.sla2_report?.[0];
  const [headline, ...text] = (output.text?.[0] ?? "").split("\n");
  const panel = panelOf(node, 360);
  const head = el("p", { class: "sla2-head", text: fromServer(headline), role: "status" });
  if (!data?.layers) {
    panel.show(head);
    return;
  }
  const maps = output.sla2_maps?.[0];
  const choice = maps ? mapChooser(node, maps) : null;
  panel.show(
    head,
    el("p", { class: "sla2-quiet", text: barsCaption(data.layers) }),
    layerBars(data.layers, choice),
    ...(choice ? [choice.controls, choice.picture, choice.caption] : []),
    el("details", {}, el("summary", { text: t`every layer as text` }), el("pre", { text: text.join("\n") })),
  );
}

function hasError(row) {
  return typeof row.attention_error === "number";
}

function barsCaption(layers) {
  if (!layers.some(hasError)) return t`accelerated calls per layer`;
  return t`accelerated calls per layer; blue: attention error 0, orange: ${LARGE_ERROR} or more`;
}

function barColour(row) {
  if (!hasError(row)) return "var(--sla2-main)";
  const share = Math.min(1, row.attention_error / LARGE_ERROR);
  return `color-mix(in srgb, var(--sla2-worse) ${(100 * share).toFixed(1)}%, var(--sla2-main))`;
}

function layerBars(layers, choice) {
  const picture = svg("svg", {
    viewBox: `0 0 ${WIDTH} ${BARS + 14}`,
    role: "img",
    "aria-label": t`accelerated and dense calls per layer`,
  });
  const step = WIDTH / Math.max(1, layers.length);
  layers.forEach((row, number) => {
    const dense = Object.values(row.dense).reduce((sum, count) => sum + count, 0);
    const total = row.sparse + dense;
    const height = total ? (BARS * row.sparse) / total : 0;
    const at = { x: number * step + step * 0.1, width: step * 0.8 };
    const bar = svg(
      "g",
      {},
      svg("rect", { ...at, y: 0, height: BARS, fill: "var(--sla2-rest)", "fill-opacity": total ? 0.35 : 0.1 }),
      svg("rect", { ...at, y: BARS - height, height, style: `fill: ${barColour(row)}` }),
      svg("title", { text: sentence(row, dense) }),
    );
    bar.addEventListener("click", () => choice?.chooseLayer(row.layer));
    picture.append(bar);
  });
  if (layers.length) {
    picture.append(
      svg("text", { x: 2, y: BARS + 11, text: t`layer ${layers[0].layer}` }),
      svg("text", { x: WIDTH - 2, y: BARS + 11, "text-anchor": "end", text: t`layer ${layers.at(-1).layer}` }),
    );
  }
  return picture;
}

function sentence(row, dense) {
  const parts = [t`layer ${row.layer}: ${row.sparse} accelerated, ${dense} dense`];
  if (row.sparsity !== null) parts.push(t`skips ${(100 * row.sparsity).toFixed(1)}%`);
  if (hasError(row)) parts.push(t`attention error ${row.attention_error.toFixed(3)}`);
  for (const [kind, value] of Object.entries(row.milliseconds)) parts.push(kind === "sparse" ? t`${value.toFixed(2)} ms per sparse call` : t`${value.toFixed(2)} ms per dense call`);
  for (const [reason, count] of Object.entries(row.dense)) parts.push(`${count} x ${fromServer(reason)}`);
  return parts.join("\n");
}

function mapChooser(node, maps) {
  // chosen last, also of an earlier run
  const chosen = (node.sla2Map ??= { layer: maps.layers[0], step: maps.steps[0] });
  const picture = el("canvas", { width: MAP * 2, height: MAP * 2, role: "img" });
  picture.style.maxWidth = `${MAP}px`;
  picture.style.margin = "0 auto";
  const caption = el("p", { class: "sla2-quiet" });
  const image = new Image();
  const draw = () => drawMap(picture, image, maps, chosen);
  const layer = chooser(t`layer`, maps.layers, chosen, "layer", (value) => `${value}`, draw);
  const step = chooser(t`step`, maps.steps, chosen, "step", (value) => `${value + 1}`, draw);
  const size = maps.frames ? t`${maps.tokens} tokens, ${maps.frames} latent frames (lines)` : t`${maps.tokens} tokens`;
  caption.textContent = t`down: query blocks, across: key blocks; bright: computed exactly by most heads. ${size}`;
  image.addEventListener("load", draw);
  image.addEventListener("error", () => {
    caption.textContent = t`the map's file is gone (ComfyUI empties its temporary folder at start): run again`;
  });
  image.src = fileURL(maps.file);
  return {
    picture,
    caption,
    controls: el("div", { class: "sla2-row" }, el("span", { text: t`routing map of` }), layer.label, step.label),
    chooseLayer(value) {
      if (!maps.layers.includes(value)) return;
      layer.select.value = value;
      chosen.layer = value;
      draw();
    },
  };
}

function chooser(text, values, chosen, key, name, draw) {
  if (!values.includes(chosen[key])) chosen[key] = values[0];
  const select = el("select", {}, ...values.map((value) => el("option", { value, text: name(value) })));
  select.value = chosen[key];
  select.addEventListener("change", () => {
    chosen[key] = Number(select.value);
    draw();
  });
  return { select, label: el("label", {}, el("span", { text }), select) };
}

function drawMap(canvas, image, maps, { layer, step }) {
  if (!image.complete || !image.naturalWidth) return;
  const [width, height] = maps.tile;
  const pen = canvas.getContext("2d");
  pen.imageSmoothingEnabled = false;
  const from = [maps.steps.indexOf(step) * width, maps.layers.indexOf(layer) * height];
  pen.drawImage(image, ...from, width, height, 0, 0, canvas.width, canvas.height);
  canvas.setAttribute("aria-label", t`routing map of layer ${layer}, step ${step + 1}`);
  canvas.dataset.shown = `${layer}/${step}`;
  if (!maps.frames || maps.frames > 60) return;
  pen.strokeStyle = "rgba(80, 160, 255, 0.55)";
  pen.lineWidth = 1;
  for (let frame = 1; frame < maps.frames; frame++) {
    const at = Math.round((frame * canvas.width) / maps.frames) + 0.5;
    pen.beginPath();
    pen.moveTo(at, 0);
    pen.lineTo(at, canvas.height);
    pen.moveTo(0, at);
    pen.lineTo(canvas.width, at);
    pen.stroke();
  }
}
