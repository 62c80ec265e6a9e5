// What a training measured, kept while the page is open, and the schedule that it suggests (nodes/suggested_schedule.py).
import { parseSchedule } from "./schedule.js";

const measured = new Map();

// also of a node made anew: after an undo or a change of the tab
function placeOf(node) {
  return `${node.graph?.id}|${node.id}`;
}

export function keepMeasured(trainer, output) {
  const data = output.sla2_training?.[0];
  if (data) measured.set(placeOf(trainer), data);
}

// {layers, suggestions: [{tolerance, schedule}, ...]} of the training that makes this node's router, else of one beside it
export function measuredFor(node) {
  const slot = (node.inputs ?? []).findIndex((input) => input.name === "router");
  const wired = slot < 0 ? null : node.getInputNode(slot);
  const beside = (node.graph?.nodes ?? []).filter((other) => other.comfyClass === "SLA2TrainRouter");
  const trainer = [wired, ...beside].find((other) => other && measured.has(placeOf(other)));
  return trainer ? measured.get(placeOf(trainer)) : null;
}

// Rules for a part of the run stay, after the suggestion; those for the whole run are what it replaces.
export function withSuggestion(text, schedule, layerCount) {
  const kept = parseSchedule(text, layerCount).filter(({ steps: [from, to] }) => from !== 0 || to !== 1);
  return [schedule, ...kept.map((rule) => rule.text)].join("; ");
}
