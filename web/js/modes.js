// Widgets that count only in one mode of another widget are shown only there. They stay in node.widgets, so their values
// are saved, loaded, undone and queued as ever.
import { chain, isLinked, widgetOf } from "./widgets.js";

function setHidden(widget, hidden) {
  const changed = !!widget.hidden !== hidden;
  widget.hidden = hidden; // the classic canvas
  widget.options = Object.assign(widget.options ?? {}, { hidden }); // Vue nodes
  // a page that loads a graph again keeps its record of the widget, with the options of the widget before this one
  if (widget._state?.options) widget._state.options.hidden = hidden;
  return changed;
}

// modes: {widget: {other widget: [values with which it counts]}}
export function hideByMode(node, modes) {
  const widget = (name) => widgetOf(node, name);

  function update(resize) {
    const spare = node.size[1] - node.computeSize()[1];
    let changed = false;
    for (const [name, needs] of Object.entries(modes)) {
      if (!widget(name)) continue;
      // a value that comes over a wire is unknown here
      const counts = Object.entries(needs).every(
        ([other, values]) => !widget(other) || isLinked(node, other) || values.includes(widget(other).value),
      );
      changed = setHidden(widget(name), !counts && !isLinked(node, name)) || changed;
    }
    if (changed && resize) node.setSize([node.size[0], node.computeSize()[1] + Math.max(0, spare)]);
    if (changed) node.setDirtyCanvas?.(true, true);
  }

  for (const name of new Set(Object.values(modes).flatMap((needs) => Object.keys(needs)))) {
    if (widget(name)) chain(widget(name), "callback", () => update(true));
  }
  chain(node, "onConfigure", () => update(false));
  chain(node, "onConnectionsChange", () => update(true));
  update(true);
}
