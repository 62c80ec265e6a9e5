// SLA2 Apply Attention: a map of step x layer that reads and writes the text in `schedule`, opened on demand.
import { app } from "../../../scripts/app.js";
import { rootOf } from "./graph.js";
import { el, makePanel } from "./panel.js";
import { COLUMNS, paint } from "./painting.js";
import { parseSchedule, sparsityOf } from "./schedule.js";
import { colourOf, scheduleMap } from "./schedule_map.js";
import { suggestionFor, withSuggestion } from "./suggestion.js";
import { chain, isLinked, setByUser, widgetOf } from "./widgets.js";
import { t } from "./texts.js";

const USUAL_LAYERS = [30, 40, 60]; // drawn until a run has told: the first that has every layer the text names
const BRUSHES = [null, 0.8, 0.85, 0.9, 0.95, 0.97];
const opened = new Set(); // an undo makes nodes anew: those whose map is open, by workflow, graph and id
const keyOf = (node) => `${rootOf(app).id}|${node.graph?.id}|${node.id}`;

function isReadable(text, layerCount) {
  try {
    parseSchedule(text, layerCount);
    return true;
  } catch {
    return false;
  }
}

export function addScheduleEditor(node) {
  const [schedule, sparsity] = [widgetOf(node, "schedule"), widgetOf(node, "sparsity")];
  if (!schedule || !node.addDOMWidget) return; // a page without them keeps its plain text
  let [layers, brush] = [null, BRUSHES[3]];
  const panel = makePanel(node, "sla2_schedule", 300, 4);
  const said = el("p", { class: "sla2-quiet", role: "status" });
  const map = scheduleMap({ onChosen: (cells) => write((text) => paint(text, cells, brush, count())), onPoint: tell });
  const group = { class: "sla2-row sla2-brushes", role: "group", "aria-label": t`paint with` };
  const brushes = el("div", group, ...BRUSHES.map(brushFor));
  const suggest = el("button", { type: "button", text: t`Suggest from training` });
  const about = el("p", { class: "sla2-quiet" });
  const drawing = el("div", {}, brushes, map.element);
  const summary = el("summary", { text: t`Schedule as a map` });
  const details = el("details", {}, summary, drawing, el("div", { class: "sla2-row" }, suggest), said, about);
  panel.show(details);

  const count = () => layers ?? USUAL_LAYERS.find((number) => isReadable(schedule.value, number)) ?? USUAL_LAYERS[0];
  const otherwise = () => (isLinked(node, "sparsity") ? undefined : sparsity.value);

  function brushFor(value) {
    const text = value === null ? t`dense` : value.toFixed(2);
    const button = el("button", { type: "button", text, "aria-pressed": value === brush });
    button.style.setProperty("--sla2-swatch", colourOf(value));
    button.addEventListener("click", () => {
      brush = value;
      for (const other of brushes.children) other.setAttribute("aria-pressed", other === button);
    });
    return button;
  }

  function tell(column, layer) {
    const found = sparsityOf(parseSchedule(schedule.value, count()), layer, (column + 0.5) / COLUMNS, otherwise());
    const words = { null: t`dense`, undefined: t`as the sparsity input says` }[found] ?? t`sparsity ${found}`;
    said.textContent = t`${10 * column}%-${10 * column + 10}%, layer ${layer}: ${words}`;
  }

  // change(text) gives the new text
  function write(change) {
    try {
      const text = change(schedule.value);
      if (text !== schedule.value) setByUser(node, schedule, text);
    } catch (error) {
      said.textContent = t`Nothing was written: ${error.message}`;
    }
  }

  function redraw() {
    if (!details.open) return;
    const wired = isLinked(node, "schedule");
    const unknown = layers ? "" : t` Layers unknown until the first run: ${count()} are drawn.`;
    suggest.hidden = wired;
    drawing.hidden = true;
    said.textContent = "";
    about.textContent = wired ? t`The schedule comes over a wire.` : "";
    if (wired) return;
    try {
      const rules = parseSchedule(schedule.value, count());
      map.draw(rules, count(), otherwise());
      drawing.hidden = false;
      const numbered = rules.some((rule) => rule.numbers) ? t` Rules for numbered steps apply but are not drawn.` : "";
      about.textContent = t`Drag, or select with Shift and arrow keys and press Enter. dense_layers and the percents apply in addition.${numbered}${unknown}`;
    } catch (error) {
      about.textContent = t`This text has no map: ${error.message} It is left unchanged; correct it above.`;
    }
  }

  suggest.addEventListener("click", () => {
    const found = suggestionFor(node);
    if (!found) {
      said.textContent = t`No measured errors yet: run SLA2 Train Router in this workflow while the page is open.`;
    } else if (layers && layers !== found.layers) {
      said.textContent = t`That training has ${found.layers} layers, this model has ${layers}.`;
    } else {
      layers = found.layers;
      write((text) => withSuggestion(text, found.schedule, layers));
    }
  });
  details.addEventListener("toggle", () => {
    opened[details.open ? "add" : "delete"](keyOf(node));
    redraw();
  });
  chain(schedule, "callback", redraw);
  chain(sparsity, "callback", redraw);
  chain(node, "onConnectionsChange", redraw);
  chain(node, "onConfigure", () => {
    details.open = opened.has(keyOf(node));
    redraw();
  });
  node.sla2Schedule = {
    setLayers(number) {
      layers = number ?? layers;
      redraw();
    },
  };
}
