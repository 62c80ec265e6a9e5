// SLA2 Train Router and SLA2 Train LoRA: the loss while they train. Where there are several layers, their mean is a line, and
// the best and the worst layer are a band.
import { el, panelOf, svg } from "./panel.js";
import { fromServer, t } from "./texts.js";

const WIDTH = 320;
const HEIGHT = 130;
const LEFT = 44;
const BOTTOM = 18;
const TOP = 6;

export function showTraining(node, { headline, curves, caption }) {
  const panel = panelOf(node, 340);
  const last = curves.mean.at(-1);
  const words = last === undefined ? t`no step yet` : `${last.toPrecision(3)} ${caption}`;
  panel.show(
    el("p", { class: "sla2-head", text: fromServer(headline), role: "status" }),
    lossChart(curves),
    el("p", { class: "sla2-quiet", text: words }),
  );
}

function lossChart({ at, steps, mean, low, high }) {
  const label = mean.length ? t`loss from ${mean[0].toPrecision(3)} to ${mean.at(-1).toPrecision(3)}` : t`no loss yet`;
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label });
  const positive = [...low, ...high].filter((value) => value > 0);
  if (!positive.length) return picture;
  const [least, most] = [Math.log10(Math.min(...positive)), Math.log10(Math.max(...positive))];
  const range = Math.max(most - least, 0.1);
  const x = (step) => LEFT + ((WIDTH - LEFT - 6) * (step - 1)) / Math.max(1, steps - 1);
  const y = (value) => TOP + (HEIGHT - TOP - BOTTOM) * (1 - (Math.log10(Math.max(value, 10 ** least)) - least) / range);
  const points = (values) => values.map((value, n) => `${x(at[n]).toFixed(1)},${y(value).toFixed(1)}`);
  for (const share of [0, 0.5, 1]) {
    const value = 10 ** (least + range * share);
    picture.append(
      svg("line", { x1: LEFT, x2: WIDTH - 6, y1: y(value), y2: y(value), stroke: "var(--border-color, #555)" }),
      svg("text", { x: 2, y: y(value) + 3, text: value.toPrecision(2) }),
    );
  }
  picture.append(
    svg("polygon", {
      points: [...points(low), ...points(high).reverse()].join(" "),
      fill: "var(--sla2-main)",
      "fill-opacity": 0.25,
    }),
    svg("polyline", {
      points: points(mean.length === 1 ? [mean[0], mean[0]] : mean).join(" "),
      fill: "none",
      stroke: "var(--sla2-main)",
      "stroke-width": 2,
    }),
    svg("text", { x: LEFT, y: HEIGHT - 4, text: t`step ${1}` }),
    svg("text", { x: WIDTH - 6, y: HEIGHT - 4, "text-anchor": "end", text: t`step ${steps}` }),
  );
  return picture;
}
