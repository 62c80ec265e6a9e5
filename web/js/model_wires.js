// The MODEL wires of a workflow that end in sampling, those inside subgraphs too. Reads the graph, changes nothing.

const NEVER = 2;
const BYPASS = 4;
// what a node that samples, or guides a sampler, hands on
const SAMPLED = ["LATENT", "GUIDER"];

export const isOff = (node) => node.mode === NEVER || node.mode === BYPASS;

// Map of every graph, the root first, to the nodes that stand for it: [{graph, node}, ...]; counts(node): whether one does
export function graphsOf(root, counts = () => true) {
  const found = new Map([[root, []]]);
  for (const graph of found.keys()) {
    for (const node of graph.nodes.filter((candidate) => candidate.subgraph && counts(candidate))) {
      const places = found.get(node.subgraph) ?? [];
      found.set(node.subgraph, [...places, { graph, node }]); // a map is walked on to what is added meanwhile
    }
  }
  return found;
}

export function linksFrom(graph, node) {
  return [...graph.links.values()].filter((link) => link.origin_id === node.id);
}

// node.getInputLink() says something else of a subgraph's node: the link inside of it
export function linkInto(graph, node, slot) {
  return [...graph.links.values()].find((link) => link.target_id === node.id && link.target_slot === slot) ?? null;
}

// [{graph, link, targets: [{node, slot}]}, ...]: one wire per output that samplers and guiders of these graphs take their MODEL
// from; link is the wire to the first of them
export function samplingWires(graphs) {
  const wires = new Map();
  for (const graph of graphs.keys()) {
    for (const node of graph.nodes.filter((candidate) => samples(candidate) && !isOff(candidate))) {
      node.inputs.forEach((input, slot) => {
        const link = input.type === "MODEL" ? linkInto(graph, node, slot) : null;
        if (!link) return;
        const key = `${graph.id}|${link.origin_id}|${link.origin_slot}`;
        if (!wires.has(key)) wires.set(key, { graph, link, targets: [] });
        wires.get(key).targets.push({ node, slot });
      });
    }
  }
  return [...wires.values()];
}

// By types, so that other packs' samplers count too. A node that hands the MODEL on prepares it, unless it has steps of its own;
// one without conditioning adds noise or reads sigmas.
function samples(node) {
  if (node.subgraph || node.comfyClass?.startsWith("SLA2")) return false;
  const takes = (type) => node.inputs?.some((input) => input.type === type);
  const gives = (type) => node.outputs?.some((output) => output.type === type);
  return takes("CONDITIONING") && SAMPLED.some(gives) && (!gives("MODEL") || hasOwn(node, "steps"));
}

// The wires that a wire is the continuation of: into and out of subgraphs. `own` is the node that it starts at, or null.
function before(graph, link, graphs) {
  if (link.origin_id === graph.inputNode?.id) {
    const places = graphs.get(graph) ?? [];
    const outside = (at) => ({ graph: at.graph, link: linkInto(at.graph, at.node, link.origin_slot), at });
    return { own: null, wires: places.map(outside) };
  }
  const node = graph.getNodeById(link.origin_id);
  if (!node?.subgraph) return { own: node, wires: [] };
  const inner = linkInto(node.subgraph, node.subgraph.outputNode, link.origin_slot);
  return { own: null, wires: [{ graph: node.subgraph, link: inner }] };
}

// The nodes of a class that a MODEL wire has passed; null where one of its branches has passed none. A branch that takes the
// MODEL from where such a node takes it is the other side of a switch that somebody built on purpose.
export function passed(graph, link, comfyClass, graphs, seen = new Set()) {
  if (!link || seen.has(link)) return null;
  const path = new Set([...seen, link]); // not shared: two branches of a switch may meet again
  const { own, wires } = before(graph, link, graphs);
  if (own?.comfyClass === comfyClass) return [own];
  const sources = own ? modelLinks(graph, own).map((source) => ({ graph, link: source })) : wires;
  const found = sources.map((source) => passed(source.graph, source.link, comfyClass, graphs, path));
  const nodes = found.flat().filter(Boolean);
  const around = ({ graph, link }) =>
    nodes.some((node) => graph.nodes.includes(node) && modelLinks(graph, node).some((before) => sameOrigin(before, link)));
  return nodes.length && sources.every((source, index) => found[index] || around(source)) ? nodes : null;
}

const sameOrigin = (one, other) => one.origin_id === other?.origin_id && one.origin_slot === other.origin_slot;

// a switch has inputs of any type: the wires tell
function modelLinks(graph, node) {
  return (node.inputs ?? []).map((_, slot) => linkInto(graph, node, slot)).filter((link) => link?.type === "MODEL");
}

function hasOwn(node, name) {
  return [...(node.inputs ?? []), ...(node.widgets ?? [])].some((candidate) => candidate.name === name);
}
