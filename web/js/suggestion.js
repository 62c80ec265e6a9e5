// The schedule that a training suggests from its measured errors (nodes/training/suggested_schedule.py), for SLA2 Apply Attention.
import { app } from "../../../scripts/app.js";
import { allRemembered } from "./graph.js";
import { parseSchedule } from "./schedule.js";

// {schedule, layers} of the training that makes this node's router, else of the newest one in this workflow, else undefined
export function suggestionFor(node) {
  const found = allRemembered(app, "training").filter(({ detail }) => detail.suggestion?.schedule);
  const slot = (node.inputs ?? []).findIndex((input) => input.name === "router");
  const wired = slot < 0 ? null : node.getInputNode(slot);
  return (found.find((one) => one.node === wired) ?? found.at(-1))?.detail.suggestion;
}

// Rules for a part of the run stay and go after the suggestion; those for the whole run are what it replaces.
export function withSuggestion(text, schedule, layerCount) {
  parseSchedule(schedule, layerCount);
  const kept = parseSchedule(text, layerCount).filter(({ steps: [from, to], numbers }) => numbers || from !== 0 || to !== 1);
  return [schedule, ...kept.map((rule) => rule.text)].join("; ");
}
