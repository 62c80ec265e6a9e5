// The inputs that most users never set are folded away: by ComfyUI's own flag "advanced", and unfolded by the node's own state
// (showAdvanced, saved with the workflow). Nodes 2.0 does that by itself; here is the same for the classic canvas, and one widget
// that is shown above all others. The widgets stay where they are in node.widgets: saved workflows hold their values in that order.
import { app } from "../../../scripts/app.js";
import { addRules } from "./style.js";
import { chain, widgetOf } from "./widgets.js";
import { t } from "./texts.js";

const ALWAYS_SHOWN = "Comfy.Node.AlwaysShowAdvancedWidgets";

// first: name of the widget that comes first to the eye
export function foldAdvanced(node, first) {
  const folded = app.extensionManager.setting.get(ALWAYS_SHOWN) ? [] : node.widgets.filter((widget) => widget.options?.advanced);
  for (const widget of folded) widget.advanced = true; // the classic canvas reads this one
  const button = folded.length ? addButton(node) : null;
  showIfSet(node, folded);
  const isShown = (widget) => !widget.hidden && (!folded.includes(widget) || node.showAdvanced);
  const rank = (widget) => (widget.name === first ? 0 : folded.includes(widget) ? 3 : widget === button ? 2 : 1);
  node.getLayoutWidgets = () => node.widgets.filter(isShown).sort((one, other) => rank(one) - rank(other));
  chain(node, "onAdded", () => putFirst(node, widgetOf(node, first)));
}

// A workflow that was saved before anything was folded, with one of these inputs set: nothing that counts is out of sight.
function showIfSet(node, folded) {
  const usual = new Map(folded.map((widget) => [widget, widget.value]));
  chain(node, "onConfigure", () => {
    if (folded.some((widget) => !widget.hidden && widget.value !== usual.get(widget))) node.showAdvanced ??= true;
  });
}

// Nodes 2.0 has a button of its own.
function addButton(node) {
  const button = node.addWidget("button", "sla2_advanced", null, () => node.toggleAdvanced(), { serialize: false, canvasOnly: true });
  button.serialize = false;
  const toggle = node.toggleAdvanced;
  // as high as what is shown, and what the user had left free
  node.toggleAdvanced = function () {
    const spare = Math.max(0, this.size[1] - this.computeSize()[1]);
    toggle.call(this);
    this.setSize([this.size[0], this.computeSize()[1] + spare]);
  };
  chain(node, "onDrawBackground", () => (button.label = node.showAdvanced ? t`Hide advanced inputs` : t`Show advanced inputs`));
  return button;
}

// In Nodes 2.0, whose grid has a row for each widget.
function putFirst(node, widget) {
  const names = [...new Set([widget.name, widget.label ?? widget.name])].map((name) => `[aria-label=${JSON.stringify(name)}]`);
  addRules(`first ${node.id}`, `[data-widgets-grid-node-id="${node.id}"] > :has(:is(${names.join(", ")})) { order: -1; }`);
}
