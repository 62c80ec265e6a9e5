// The grammar of nodes/settings/schedule.py in the page: which sparsity a text gives a layer at a share of the run, or in a step by its
// number. It knows no page.
import { t } from "./texts.js";

const MAX_CHARACTERS = 300; // of one rule
const NUMBER = String.raw`(\d+(?:\.\d+)?|\.\d+)`;
const STEPS = new RegExp(String.raw`${NUMBER}\s*%\s*-\s*${NUMBER}\s*%`);
const NUMBERED = /steps?\s+(\d{1,5})(?:\s*-\s*(\d{1,5}))?/;
const LAYERS = /^layers?\s+(.+)$/s;
const VALUE = new RegExp(String.raw`^${NUMBER}(?:\s*->\s*${NUMBER})?$`);
const LAYER_RANGE = /^(-?\d{1,6})(?:\s*-\s*(-?\d{1,6}))?$/;
const BLANKS_OF_PYTHON = /[\x1c-\x1f\x85]/g; // which JavaScript does not count as blank
const FULL_WIDTH = { "，": ",", "、": ",", "；": ";", "：": ":", "％": "%" }; // as Chinese keyboards type them
const SEPARATOR = /([^\S\n]*[;\n][;\s]*)/;

// [{text, steps: [from, to], numbers: [first, last] step in place of steps or null, layers: Set or null,
// sparsity: [at the first step, at the last] or null (dense), after}]
// after: what stood between it and the next rule. Throws an Error of one sentence.
export function parseSchedule(text, layerCount) {
  const pieces = halfWidth(text).replace(BLANKS_OF_PYTHON, " ").split(SEPARATOR);
  const rules = [];
  for (let n = 0; n < pieces.length; n += 2) {
    const part = pieces[n].trim();
    if (part) rules.push({ ...parseRule(part, layerCount), text: part, after: pieces[n + 1] ?? "" });
  }
  return rules;
}

function halfWidth(text) {
  return text.replace(/[，、；：％]/g, (mark) => FULL_WIDTH[mark]);
}

function parseRule(part, layerCount) {
  if (part.length > MAX_CHARACTERS) throw new Error(t`a rule is longer than ${MAX_CHARACTERS} characters.`);
  const colon = part.lastIndexOf(":");
  if (colon < 0) throw new Error(t`"${part}" has no colon.`);
  const where = part.slice(0, colon).trim();
  let [rest, steps, numbers, layers] = [where, [0, 1], null, null];
  const byShare = STEPS.exec(rest);
  const range = byShare ?? NUMBERED.exec(rest);
  if (byShare) steps = [Number(range[1]) / 100, Number(range[2]) / 100];
  else if (range) numbers = [Number(range[1]), Number(range[2] ?? range[1])];
  if (range) {
    rest = (rest.slice(0, range.index) + rest.slice(range.index + range[0].length)).replace(/^[ ,]+|[ ,]+$/g, "");
  }
  const named = LAYERS.exec(rest);
  if (named) [layers, rest] = [parseLayers(named[1], layerCount), ""];
  if (rest || !where) throw new Error(t`"${where}" is no range of steps or layers.`);
  if (!(steps[0] < steps[1] && steps[1] <= 1)) {
    throw new Error(t`the steps of "${where}" must rise and lie between 0% and 100%.`);
  }
  if (numbers && !(1 <= numbers[0] && numbers[0] <= numbers[1])) {
    throw new Error(t`the steps of "${where}" count from 1 and must rise.`);
  }
  return { steps, numbers, layers, sparsity: parseValue(part.slice(colon + 1).trim()) };
}

function parseValue(text) {
  if (text === "dense") return null;
  const found = VALUE.exec(text);
  const values = found ? [Number(found[1]), Number(found[2] ?? found[1])] : [];
  if (!values.length || values.some((value) => value >= 1)) {
    throw new Error(t`"${text}" is neither "dense" nor a sparsity of at least 0 and below 1.`);
  }
  return values;
}

// "0, 1, 28-29" -> Set {0, 1, 28, 29}; -1 is the last layer. As parse_layers of nodes/settings/values.py
export function parseLayers(text, layerCount) {
  const layers = new Set();
  for (const part of halfWidth(text).split(",").map((piece) => piece.trim()).filter(Boolean)) {
    const found = LAYER_RANGE.exec(part);
    if (!found) throw new Error(t`"${part}" is no layer or range of layers.`);
    const ends = [Number(found[1]), Number(found[2] ?? found[1])];
    for (const layer of ends) {
      if (layer < -layerCount || layer >= layerCount) {
        throw new Error(t`there is no layer ${layer}: the layers are 0 to ${layerCount - 1}.`);
      }
    }
    const [first, last] = ends.map((layer) => (layer < 0 ? layer + layerCount : layer));
    if (first > last) throw new Error(t`the range "${part}" ends before it starts.`);
    for (let layer = first; layer <= last; layer++) layers.add(layer);
  }
  return layers;
}

// progress: share of the run, step: number from 1; each null where it is not known
export function covers(rule, layer, progress, step = null) {
  if (rule.layers && !rule.layers.has(layer)) return false;
  if (rule.numbers) return step !== null && rule.numbers[0] <= step && step <= rule.numbers[1];
  const [from, to] = rule.steps;
  return (from === 0 && to === 1) || (progress !== null && from <= progress && progress <= to);
}

// null: dense
export function sparsityOf(rules, layer, progress, otherwise, step = null) {
  const rule = rules.findLast((candidate) => covers(candidate, layer, progress, step));
  return rule ? sparsityAt(rule, progress, step) : otherwise;
}

function sparsityAt({ sparsity, steps, numbers }, progress, step) {
  if (!sparsity) return null;
  const [first, last] = sparsity;
  const [[from, to], place] = numbers ? [numbers, step] : [steps, progress];
  if (first === last || from === to || place === null) return first;
  const share = Math.min(Math.max((place - from) / (to - from), 0), 1);
  return twoDigits(first + (last - first) * share);
}

// as Python rounds: to the even digit where two are equally near, which in binary only odd eighths are
function twoDigits(value) {
  const isTie = Number.isInteger(value * 8) && !Number.isInteger(value * 4);
  return isTie ? (2 * Math.round(value * 50)) / 100 : Number(value.toFixed(2));
}
