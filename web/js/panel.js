// A panel below a node's widgets. What comes from the server is only ever set as text.
import { addRules } from "./style.js";

const SVG = "http://www.w3.org/2000/svg";
const STYLE = `
.sla2 { box-sizing: border-box; width: 100%; height: 100%; overflow: hidden auto; padding: 6px 8px; border-radius: 6px;
  color: var(--input-text, #ddd); background: var(--comfy-input-bg, #222); font: 12px/1.4 Inter, Arial, sans-serif; }
.sla2-content { display: flow-root; }
.sla2 p { margin: 0 0 3px; overflow-wrap: anywhere; }
.sla2 .sla2-head { font-weight: 600; }
.sla2 pre { margin: 4px 0 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 11px; user-select: text; }
.sla2 summary { cursor: pointer; }
.sla2 .sla2-quiet { color: var(--descrip-text, #999); }
.sla2 .sla2-warn::before { content: "\\26A0 "; }
.sla2 svg, .sla2 canvas { display: block; width: 100%; }
.sla2 text { fill: var(--descrip-text, #999); font-size: 10px; }
.sla2 .sla2-row { display: flex; flex-wrap: wrap; gap: 4px 12px; align-items: center; margin: 4px 0; }
.sla2 label { display: flex; gap: 4px; align-items: center; }
.sla2 select, .sla2 button { color: inherit; background: var(--comfy-menu-bg, #333); font: inherit; padding: 2px 8px;
  border: 1px solid var(--border-color, #555); border-radius: 4px; }
.sla2 button { cursor: pointer; }
.sla2 :is(select, button, summary, canvas, input):focus-visible { outline: 2px solid var(--p-primary-color, #4a90e2); }
.sla2 table { width: 100%; border-collapse: collapse; }
.sla2 :is(td, th) { padding: 1px 6px 1px 0; text-align: left; font-weight: 400; vertical-align: top; }
.sla2 td { font-variant-numeric: tabular-nums; }
.sla2 [hidden] { display: none; }
.sla2 .sla2-map { display: grid; grid-template-columns: auto 1fr; gap: 0 6px; margin: 4px 0; font-size: 10px;
  color: var(--descrip-text, #999); }
.sla2 .sla2-map > div { display: flex; flex-direction: column; justify-content: space-between; }
.sla2 .sla2-map > div:last-child { grid-column: 2; flex-direction: row; }
.sla2 .sla2-map canvas { touch-action: none; cursor: crosshair; }
.sla2 .sla2-brushes { gap: 3px; }
.sla2 .sla2-brushes button { padding: 2px 4px; }
.sla2 .sla2-brushes button::before { content: ""; display: inline-block; width: 10px; height: 10px; margin-right: 4px;
  border: 1px solid var(--border-color, #555); background: var(--sla2-swatch); }
.sla2 .sla2-frames { --sla2-split: 50%; position: relative; margin: 6px 0 3px; }
.sla2 .sla2-frames > * { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; }
.sla2 .sla2-frames > :first-child { position: static; display: block; height: auto; }
.sla2 .sla2-frames > :nth-child(2) { clip-path: inset(0 0 0 var(--sla2-split)); }
.sla2 .sla2-frames input { opacity: 0; cursor: ew-resize; touch-action: none; }
.sla2 .sla2-frames::after { content: ""; position: absolute; inset: 0 auto 0 var(--sla2-split); width: 2px; margin-left: -1px;
  background: #fff; outline: 1px solid #000; pointer-events: none; }
.sla2 .sla2-frames:focus-within { outline: 2px solid var(--p-primary-color, #4a90e2); }
.sla2 label input { flex: 1; min-width: 0; }
.sla2 .sla2-brushes button[aria-pressed="true"] { outline: 2px solid currentColor; outline-offset: -1px; }
.sla2 { --sla2-main: #2f7fd6; --sla2-worse: #e0761b; --sla2-rest: #8a8a8a; }
`;

export function el(tag, { text, ...attributes } = {}, ...children) {
  const element = document.createElement(tag);
  return fill(element, text, attributes, children);
}

export function svg(tag, { text, ...attributes } = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), text, attributes, children);
}

function fill(element, text, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  element.append(...children);
  return element;
}

// The panel of a node that shows what the server says, made at its first use.
export function panelOf(node, width) {
  node.sla2Panel ??= makePanel(node, "sla2_panel", width);
  return node.sla2Panel;
}

// {element, show(...children)}. It is no value of the workflow. It is as high as what it shows, and the node becomes at least
// `width` wide.
export function makePanel(node, name, width, margin = 8) {
  addRules("panels", STYLE);
  const content = el("div", { class: "sla2-content" });
  const element = el("div", { class: "sla2", "data-panel": name }, content);
  element.addEventListener("keydown", (event) => {
    // undo and the like are the page's also from here
    if (!event.ctrlKey && !event.metaKey) event.stopPropagation();
  });
  let height = 30;
  const widget = node.addDOMWidget(name, name, element, {
    serialize: false,
    hideOnZoom: false,
    margin,
    getMinHeight: () => height + 2 * margin,
    getMaxHeight: () => height + 2 * margin,
    getValue: () => "",
    setValue: () => {},
  });
  widget.serialize = false;
  if (node.size[0] < width) node.setSize([width, node.size[1]]);
  new ResizeObserver(() => {
    const needed = content.offsetHeight + 14;
    if (!content.offsetHeight || Math.abs(needed - height) < 2) return;
    const shrunk = node.size[1] - Math.max(0, height - needed);
    height = needed;
    // Vue nodes grow by themselves. A loaded node has the size that it had with this panel: it grows only where that is short
    if (!globalThis.LiteGraph?.vueNodesMode) node.setSize([node.size[0], Math.max(shrunk, node.computeSize()[1])]);
    node.setDirtyCanvas?.(true, true);
  }).observe(content);
  return { element, show: (...children) => content.replaceChildren(...children) };
}

// Nodes 2.0 goes on to show the panels of the node before, where one is made anew under its id: an undo does that.
export function takePlaces(node) {
  for (const { name, element } of node.widgets ?? []) {
    const old = element?.dataset?.panel && document.querySelector(`[data-node-id="${node.id}"] [data-panel="${name}"]`);
    if (old && old !== element) old.replaceWith(element);
  }
}
