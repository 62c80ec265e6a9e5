// A workflow from before there was a preset keeps its own sparsity and schedule: a new node's preset is another one.
import { chain, widgetOf } from "./widgets.js";

const NAME = "preset";

// whether a saved node has no value of its own for that widget, `place` being where it would stand
function lacks(saved, place) {
  if (saved.widgets_values_named) return !(NAME in saved.widgets_values_named);
  return Array.isArray(saved.widgets_values) && saved.widgets_values.length <= place;
}

export function keepOwnSettings(node) {
  const place = node.widgets.filter((widget) => widget.serialize !== false).findIndex((widget) => widget.name === NAME);
  chain(node, "onConfigure", (saved) => {
    if (lacks(saved, place)) widgetOf(node, NAME).value = "custom";
  });
}
