// A place beside a node where a new node overlaps no other.

const GAP = 30;
const TITLE = 30; // a node's position is below its title
const STEP = 60;
const REACH = 40; // steps to each side

// by position and size: bounding boxes are those of the last drawing, and most subgraphs were never drawn
function box({ pos: [x, y], size: [width, height] }) {
  return { x, y: y - TITLE, width, height: height + TITLE };
}

const overlap = (a, b) =>
  a.x < b.x + b.width + GAP && b.x < a.x + a.width + GAP && a.y < b.y + b.height + GAP && b.y < a.y + a.height + GAP;

// [x, y] for `node`, as near as can be to the left of `beside`
export function freePlace(graph, node, beside) {
  const others = graph.nodes.filter((other) => other !== node);
  const taken = [...others, graph.inputNode, graph.outputNode].filter(Boolean).map(box);
  const start = [beside.pos[0] - node.size[0] - 2 * GAP, beside.pos[1]];
  for (const [right, down] of OFFSETS) {
    const pos = [start[0] + right * STEP, start[1] + down * STEP];
    const wanted = box({ pos, size: node.size });
    if (!taken.some((other) => overlap(wanted, other))) return pos;
  }
  return [start[0], Math.max(...taken.map((other) => other.y + other.height)) + GAP + TITLE];
}

const SIDES = Array.from({ length: 2 * REACH + 1 }, (_, index) => index - REACH);
const OFFSETS = SIDES.flatMap((right) => SIDES.map((down) => [right, down])).sort(
  (a, b) => Math.hypot(...a) - Math.hypot(...b),
);
