// A node's widgets, read, set and watched the way the page itself does it.
import { app } from "../../../scripts/app.js";

export function widgetOf(node, name) {
  return node?.widgets?.find((candidate) => candidate.name === name);
}

export function isLinked(node, name) {
  const slot = node.inputs?.findIndex((input) => input.widget?.name === name) ?? -1;
  return slot >= 0 && node.isInputConnected(slot);
}

// as if the user had typed it: one step of the undo
export function setByUser(node, widget, value) {
  widget.value = value;
  widget.callback?.(value, app.canvas, node);
  node.setDirtyCanvas?.(true, true);
  const tracker = app.extensionManager?.workflow?.activeWorkflow?.changeTracker;
  (tracker?.captureCanvasState ?? tracker?.checkState)?.call(tracker);
}

// calls `added` after the method that is there
export function chain(target, name, added) {
  const before = target[name];
  target[name] = function (...values) {
    const result = before?.apply(this, values);
    added(...values);
    return result;
  };
}
