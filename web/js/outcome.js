// SLA2 Apply Attention: what the last sampling saved and cost, what was accelerated, and why calls ran dense.
import { el, panelOf } from "./panel.js";
import { fromServer, t } from "./texts.js";

export function showOutcome(node, { headline, detail, reasons, accelerated, calls, layers }) {
  const panel = panelOf(node, 300);
  const head = el("p", { class: accelerated || !calls ? "sla2-head" : "sla2-head sla2-warn", text: fromServer(headline) });
  const lines = [detail, ...reasons].filter(Boolean).map((reason) => el("p", { class: "sla2-quiet", text: fromServer(reason) }));
  panel.element.setAttribute("role", "status");
  panel.show(head, ...lines);
  node.sla2Schedule?.setLayers(layers);
}

// of a node that is muted or bypassed: what it said of an earlier run is gone, until it is on again
export function showOff(node) {
  node.sla2Panel?.show(el("p", { class: "sla2-quiet", text: t`Switched off: nothing runs through this node.` }));
}
