// Painted cells as rules of a schedule's text. The last rule that fits counts, so painting appends rules, and what the user
// wrote stays as it is written. Only rules in the very form that painting writes are tidied up: one that the stroke made
// idle goes, and a new one joins its neighbour, each only where that changes no other cell.
import { covers, parseSchedule } from "./schedule.js";

export const COLUMNS = 10;

// "0-3, 7"
export function layerRanges(layers) {
  const ranges = [];
  for (const layer of [...layers].sort((a, b) => a - b)) {
    if (ranges.at(-1)?.[1] === layer - 1) ranges.at(-1)[1] = layer;
    else ranges.push([layer, layer]);
  }
  return ranges.map(([first, last]) => (first === last ? `${first}` : `${first}-${last}`)).join(", ");
}

// The text with the cells [[column, layer], ...] painted; value: a sparsity, or null for dense. Throws as parseSchedule does.
export function paint(text, cells, value, layerCount) {
  const rules = parseSchedule(text, layerCount);
  const sparsity = value === null ? null : [value, value];
  const changed = cells.filter(([column, layer]) => !holds(rules, column, layer, valueOf({ sparsity })));
  if (!changed.length) return text;
  const fresh = rectangles(changed, layerCount).map((where) => written({ ...where, sparsity, fresh: true }));
  const left = tidied(rules, fresh, layerCount);
  return left.map((rule, n) => rule.text + (n < left.length - 1 ? rule.after || "; " : "")).join("");
}

function holds(rules, column, layer, value) {
  const [from, to] = [column / COLUMNS, (column + 1) / COLUMNS];
  const inside = pointsOf(rules, [from, to]).filter((point) => from < point && point < to);
  return valuesAt(rules, inside, [layer]).every((found) => found === value);
}

// neighbouring columns with the same layers are one
function rectangles(cells, layerCount) {
  const columns = Array.from({ length: COLUMNS }, () => new Set());
  for (const [column, layer] of cells) columns[column].add(layer);
  const found = [];
  columns.forEach((painted, column) => {
    if (!painted.size) return;
    const layers = unlessAll(painted, layerCount);
    const before = found.at(-1);
    if (before?.to === column && sameLayers(before.layers, layers)) before.to = column + 1;
    else found.push({ from: column, to: column + 1, layers });
  });
  return found.map(({ from, to, layers }) => ({ steps: [from / COLUMNS, to / COLUMNS], layers }));
}

function unlessAll(layers, layerCount) {
  return layers.size === layerCount ? null : layers;
}

function sameLayers(one, other) {
  return one === other || (one && other && one.size === other.size && [...one].every((layer) => other.has(layer)));
}

function written(rule) {
  const [from, to] = rule.steps.map((share) => `${Math.round(100 * share)}%`);
  const where = [];
  if (!rule.layers || from !== "0%" || to !== "100%") where.push(`${from}-${to}`);
  if (rule.layers) where.push(`layers ${layerRanges(rule.layers)}`);
  return { ...rule, text: `${where.join(", ")}: ${rule.sparsity ? rule.sparsity[0] : "dense"}`, after: "; " };
}

function isOfPaintedForm(rule) {
  const onLines = rule.steps.every((share) => Math.round(share * COLUMNS) / COLUMNS === share);
  return onLines && valueOf(rule) !== rule && written(rule).text === rule.text;
}

// what a rule gives, to compare: the sparsity, "dense", or a ramp, which equals nothing but itself
function valueOf(rule) {
  if (!rule.sparsity) return "dense";
  return rule.sparsity[0] === rule.sparsity[1] ? rule.sparsity[0] : rule;
}

// every border and a point in every span between two of them: rules equal there are equal everywhere
function pointsOf(rules, more = [0, 1]) {
  const borders = [...new Set([...more, ...rules.flatMap((rule) => rule.steps)])].sort((a, b) => a - b);
  return borders.flatMap((border, n) => (n ? [(borders[n - 1] + border) / 2, border] : [border]));
}

function valuesAt(rules, points, layers) {
  return layers.flatMap((layer) =>
    points.map((point) => {
      const rule = rules.findLast((candidate) => covers(candidate, layer, point));
      return rule && valueOf(rule);
    }),
  );
}

function tidied(old, fresh, layerCount) {
  const points = pointsOf([...old, ...fresh]);
  const layers = Array.from({ length: layerCount }, (_, layer) => layer);
  const isSame = (one, other, at) => {
    const [before, after] = [valuesAt(one, at, layers), valuesAt(other, at, layers)];
    return before.every((value, n) => value === after[n]);
  };
  const without = (rules, gone) => rules.filter((rule) => rule !== gone);
  // also for samplers that do not say which step it is
  const isIdle = (rules, rule) => isSame(rules, without(rules, rule), [null, ...points]);
  const mayGo = new Set(old.filter((rule) => isOfPaintedForm(rule) && !isIdle(old, rule)));
  let rules = [...old, ...fresh];
  for (;;) {
    const idle = rules.find((rule) => (rule.fresh || mayGo.has(rule)) && isIdle(rules, rule));
    const next = idle ? without(rules, idle) : joined(rules, (candidate) => isSame(rules, candidate, points), layerCount);
    if (!next) return rules;
    rules = next;
  }
}

// with a new rule and another as one, or null where that is not possible
function joined(rules, isAllowed, layerCount) {
  for (const one of rules.filter((rule) => rule.fresh)) {
    for (const other of rules.filter((rule) => rule !== one && isOfPaintedForm(rule))) {
      const union = united(one, other, layerCount);
      if (!union) continue;
      for (const [place, gone] of [[one, other], [other, one]]) {
        const candidate = rules
          .filter((rule) => rule !== gone)
          .map((rule) => (rule === place ? { ...union, after: place.after } : rule));
        if (isAllowed(candidate)) return candidate;
      }
    }
  }
  return null;
}

// one rule for exactly the cells of two of the same value, or null
function united(one, other, layerCount) {
  if (valueOf(one) !== valueOf(other)) return null;
  const steps = [Math.min(one.steps[0], other.steps[0]), Math.max(one.steps[1], other.steps[1])];
  const touch = Math.max(one.steps[0], other.steps[0]) <= Math.min(one.steps[1], other.steps[1]);
  if (touch && sameLayers(one.layers, other.layers)) return written({ ...one, steps });
  if (!one.layers || !other.layers || one.steps.some((share, n) => share !== other.steps[n])) return null;
  return written({ ...one, layers: unlessAll(new Set([...one.layers, ...other.layers]), layerCount) });
}
