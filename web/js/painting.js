// Painted rectangles as rules of a schedule's text. The last rule that fits counts, so a painted one goes to the end and
// what the user wrote stays as it is. Only rules in the very form that painting writes are tidied up: one that lies under a
// new one goes, and the last one joins a new one where both together are a rectangle again.
import { MOST_CHARACTERS, parseSchedule } from "./schedule.js";

export const COLUMNS = 10;

// columns, rows: [first, last] of a rectangle of cells. sparsity: a number, or null for dense. Throws as parseSchedule does.
export function paint(text, { columns, rows }, sparsity, layerCount) {
  const all = rows[0] === 0 && rows[1] === layerCount - 1;
  let fresh = written({
    steps: [columns[0] / COLUMNS, (columns[1] + 1) / COLUMNS],
    layers: all ? null : new Set(range(rows[0], rows[1])),
    sparsity: sparsity === null ? null : [sparsity, sparsity],
  });
  let rules = withoutHidden(parseSchedule(text, layerCount), fresh);
  for (;;) {
    const union = rules.length ? united(rules.at(-1), fresh, layerCount) : null;
    if (!union) break;
    fresh = union;
    rules = withoutHidden(rules.slice(0, -1), fresh);
  }
  return [...rules.map((rule) => rule.text + (rule.after || "; ")), fresh.text].join("");
}

function range(first, last) {
  return Array.from({ length: last - first + 1 }, (_, n) => first + n);
}

// "0-3, 7"
function layerRanges(layers) {
  const ranges = [];
  for (const layer of [...layers].sort((a, b) => a - b)) {
    if (ranges.at(-1)?.[1] === layer - 1) ranges.at(-1)[1] = layer;
    else ranges.push([layer, layer]);
  }
  return ranges.map(([first, last]) => (first === last ? `${first}` : `${first}-${last}`)).join(", ");
}

function written(rule) {
  const [from, to] = rule.steps.map((share) => `${Math.round(100 * share)}%`);
  const where = [];
  if (!rule.layers || from !== "0%" || to !== "100%") where.push(`${from}-${to}`);
  if (rule.layers) where.push(`layers ${layerRanges(rule.layers)}`);
  return { ...rule, text: `${where.join(", ")}: ${rule.sparsity ? rule.sparsity[0] : "dense"}` };
}

function isOfPaintedForm(rule) {
  const onLines = rule.steps.every((share) => Math.round(share * COLUMNS) / COLUMNS === share);
  return onLines && (!rule.layers || rule.layers.size > 0) && written(rule).text === rule.text;
}

function withoutHidden(rules, above) {
  return rules.filter((rule) => !(isOfPaintedForm(rule) && isWithin(rule, above)));
}

function isWithin(rule, above) {
  if (rule.steps[0] < above.steps[0] || rule.steps[1] > above.steps[1]) return false;
  return !above.layers || (!!rule.layers && [...rule.layers].every((layer) => above.layers.has(layer)));
}

// one rule for exactly the cells of two of the same value, or null
function united(one, other, layerCount) {
  if (!isOfPaintedForm(one) || one.sparsity?.[0] !== other.sparsity?.[0]) return null;
  const [mine, others] = [one, other].map((rule) => rule.layers ?? new Set(range(0, layerCount - 1)));
  const layers = new Set([...mine, ...others]);
  const steps = [Math.min(one.steps[0], other.steps[0]), Math.max(one.steps[1], other.steps[1])];
  const touch = Math.max(one.steps[0], other.steps[0]) <= Math.min(one.steps[1], other.steps[1]);
  const sameLayers = layers.size === mine.size && layers.size === others.size;
  const sameSteps = one.steps.every((share, n) => share === other.steps[n]);
  if (!(sameLayers && touch) && !sameSteps) return null;
  const union = written({ ...other, steps, layers: layers.size === layerCount ? null : layers });
  return union.text.length > MOST_CHARACTERS ? null : union;
}
