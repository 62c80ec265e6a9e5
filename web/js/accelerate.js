// Puts SLA2 Apply Attention last on every MODEL wire that reaches a sampler or guider, and takes it out again.
import { graphsOf, isOff, linkInto, linksFrom, passed, samplingWires } from "./model_wires.js";
import { freePlace } from "./free_place.js";

const APPLY = "SLA2ApplyAttention";
const MARK = "sla2_accelerate"; // the property of the nodes that were put in here, saved with the workflow
const ALWAYS = 0;

// {added, present, switchedOn}: nodes put in; wires that had one; nodes that were off and are on again. make(class) makes a node.
export function accelerate(root, make) {
  const graphs = graphsOf(root, (node) => !isOff(node)); // what is muted or bypassed samples nothing
  const done = { added: 0, present: 0, switchedOn: 0 };
  for (const wire of samplingWires(graphs)) {
    const there = passed(wire.graph, wire.link, APPLY, graphs);
    if (!there) {
      put(wire, make(APPLY));
      done.added += 1;
      continue;
    }
    done.present += 1;
    for (const node of there.filter(isOff)) {
      node.mode = ALWAYS;
      done.switchedOn += 1;
    }
  }
  return done;
}

// how many nodes were taken out: those that accelerate() put in, and no others
export function removeAccelerated(root) {
  let removed = 0;
  for (const graph of graphsOf(root).keys()) {
    for (const node of graph.nodes.filter((candidate) => candidate.comfyClass === APPLY && candidate.properties?.[MARK])) {
      takeOut(graph, node);
      removed += 1;
    }
  }
  return removed;
}

function put({ graph, link, targets }, node) {
  node.properties[MARK] = true;
  graph.add(node);
  node.pos = freePlace(graph, node, targets[0].node);
  // the wire's bends stay with the part that comes from the model
  connect(graph, link, node, modelSlot(node));
  for (const target of targets) node.connect(0, target.node, target.slot);
}

function takeOut(graph, node) {
  const link = linkInto(graph, node, modelSlot(node));
  const after = linksFrom(graph, node).map(({ target_id, target_slot }) => ({ target_id, target_slot }));
  for (const { target_id, target_slot } of link ? after : []) {
    if (target_id === graph.outputNode?.id) {
      const source = graph.getNodeById(link.origin_id);
      graph.outputs[target_slot].connect(source.outputs[link.origin_slot], source, link.parentId);
    } else {
      connect(graph, link, graph.getNodeById(target_id), target_slot);
    }
  }
  graph.remove(node);
}

const modelSlot = (node) => node.inputs.findIndex((input) => input.type === "MODEL");

// from where `link` comes from, to another input
function connect(graph, link, target, slot) {
  if (link.origin_id === graph.inputNode?.id) {
    graph.inputs[link.origin_slot].connect(target.inputs[slot], target, link.parentId);
  } else {
    graph.getNodeById(link.origin_id).connect(link.origin_slot, target, slot, link.parentId);
  }
}
