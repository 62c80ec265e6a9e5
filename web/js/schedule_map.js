// The step x layer map: a canvas on which a rectangle of cells is chosen with the mouse or the keyboard.
import { el } from "./panel.js";
import { COLUMNS } from "./painting.js";
import { sparsityOf } from "./schedule.js";
import { t } from "./texts.js";

const WIDTH = 300;
const SLICES = 10; // of a column, so that ramps and borders inside it are seen
const DENSE = "#f0b429";

// sparsity: null where dense, undefined where unknown. Even steps of colour for even factors of what is kept.
export function colourOf(sparsity) {
  if (sparsity === null) return DENSE;
  if (sparsity === undefined) return "#8884";
  const share = Math.min(1, Math.log(1 - sparsity) / Math.log(0.03));
  return `hsl(${190 + 35 * share} ${45 + 25 * share}% ${88 - 62 * share}%)`;
}

// {element, draw(rules, layerCount, otherwise)}. onChosen({columns: [first, last], rows: [first, last]}), onPoint(column, row)
export function scheduleMap({ onChosen, onPoint }) {
  const canvas = el("canvas", { tabindex: 0, role: "application", "aria-label": t`sparsity by step and layer` });
  const [first, last] = [el("span"), el("span")];
  const marks = ["0%", t`steps`, "100%"].map((text) => el("span", { text }));
  const element = el("div", { class: "sla2-map" }, el("div", {}, first, last), canvas, el("div", {}, ...marks));
  let drawn = null;
  let [anchor, cursor, isDragging] = [[0, 0], [0, 0], false];

  function draw(rules, layerCount, otherwise) {
    drawn = { rules, layerCount, otherwise };
    [anchor, cursor] = [anchor, cursor].map(([column, row]) => [column, Math.min(row, layerCount - 1)]);
    first.textContent = t`layer ${0}`;
    last.textContent = t`layer ${layerCount - 1}`;
    const height = Math.min(12, Math.max(4, Math.round(240 / layerCount)));
    canvas.width = WIDTH;
    canvas.height = height * layerCount;
    const context = canvas.getContext("2d");
    const slice = WIDTH / COLUMNS / SLICES;
    for (let row = 0; row < layerCount; row++) {
      for (let n = 0; n < COLUMNS * SLICES; n++) {
        context.fillStyle = colourOf(sparsityOf(rules, row, (n + 0.5) / COLUMNS / SLICES, otherwise));
        context.fillRect(n * slice, row * height, slice, height - (height > 4 ? 1 : 0));
      }
    }
    outline(context, height);
  }

  function outline(context, height) {
    const { columns, rows } = chosen();
    const cell = WIDTH / COLUMNS;
    const box = [columns[0] * cell, rows[0] * height, (columns[1] - columns[0] + 1) * cell, (rows[1] - rows[0] + 1) * height];
    for (const [colour, width] of [["#000", 3], ["#fff", 1]]) {
      Object.assign(context, { strokeStyle: colour, lineWidth: width });
      context.strokeRect(box[0] + 1.5, box[1] + 1.5, box[2] - 3, box[3] - 3);
    }
  }

  function chosen() {
    const [columns, rows] = [0, 1].map((n) => [Math.min(anchor[n], cursor[n]), Math.max(anchor[n], cursor[n])]);
    return { columns, rows };
  }

  function move(cell, isExtended) {
    cursor = [0, 1].map((n) => Math.min(Math.max(cell[n], 0), (n ? drawn.layerCount : COLUMNS) - 1));
    if (!isExtended) anchor = cursor;
    draw(drawn.rules, drawn.layerCount, drawn.otherwise);
    onPoint(...cursor);
  }

  function cellAt(event) {
    const box = canvas.getBoundingClientRect(); // as zoomed
    const [x, y] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    return [Math.floor(x * COLUMNS), Math.floor(y * drawn.layerCount)];
  }

  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    event.stopPropagation(); // a Vue node would be dragged
    canvas.setPointerCapture(event.pointerId);
    canvas.focus();
    isDragging = true;
    move(cellAt(event), event.shiftKey);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (isDragging) move(cellAt(event), true);
    else if (drawn) onPoint(...cellAt(event));
  });
  canvas.addEventListener("pointerup", () => {
    if (isDragging) onChosen(chosen());
    isDragging = false;
  });
  canvas.addEventListener("pointercancel", () => (isDragging = false));
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (step) move([cursor[0] + step[0], cursor[1] + step[1]], event.shiftKey);
    else if (event.key === "Escape") [isDragging, anchor] = [false, cursor];
    else if (event.key === "Enter" || event.key === " ") onChosen(chosen());
    else return;
    event.preventDefault();
  });
  return { element, draw };
}
