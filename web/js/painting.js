// A painted rectangle as a rule of a schedule's text. The last rule that fits counts, so it goes to the end and what the user
// wrote stays as it is. Only a rule in the very form that painting writes goes, where it lies wholly under the new one.
import { parseSchedule } from "./schedule.js";

export const COLUMNS = 10;

// columns, rows: [first, last] of a rectangle of cells. sparsity: a number, or null for dense. Throws as parseSchedule does.
export function paint(text, { columns, rows }, sparsity, layerCount) {
  const steps = [columns[0] / COLUMNS, (columns[1] + 1) / COLUMNS];
  const layers = rows[0] === 0 && rows[1] === layerCount - 1 ? null : rows;
  const kept = parseSchedule(text, layerCount).filter((rule) => !(isPainted(rule) && isWithin(rule, steps, layers)));
  return kept.map((rule) => rule.text + (rule.after || "; ")).join("") + ruleText(steps, layers, sparsity);
}

function ruleText(steps, layers, sparsity) {
  const [from, to] = steps.map((share) => `${Math.round(100 * share)}%`);
  const where = [];
  if (!layers || from !== "0%" || to !== "100%") where.push(`${from}-${to}`);
  if (layers) where.push(`layers ${layers[0] === layers[1] ? layers[0] : layers.join("-")}`);
  return `${where.join(", ")}: ${sparsity ?? "dense"}`;
}

function ends({ layers }) {
  return layers && [Math.min(...layers), Math.max(...layers)];
}

function isPainted(rule) {
  return rule.text === ruleText(rule.steps, ends(rule), rule.sparsity && rule.sparsity[0]);
}

function isWithin(rule, steps, layers) {
  if (rule.steps[0] < steps[0] || rule.steps[1] > steps[1]) return false;
  const [first, last] = ends(rule) ?? [-Infinity, Infinity];
  return !layers || (layers[0] <= first && last <= layers[1]);
}
