// SLA2 Apply Attention: one line on the last sampling, and why calls ran dense.
import { el, panelOf } from "./panel.js";

export function showOutcome(node, { headline, reasons, accelerated, calls, layers }) {
  const panel = panelOf(node, 300);
  const head = el("p", { class: accelerated || !calls ? "sla2-head" : "sla2-head sla2-warn", text: headline });
  const lines = reasons.map((reason) => el("p", { class: "sla2-quiet", text: reason }));
  panel.element.setAttribute("role", "status");
  panel.show(head, ...lines);
  node.sla2Schedule?.setLayers(layers);
}
