// Nodes by the ids that the server uses, and what was told about them, kept while the page is open.

const told = new Map();

export function rootOf(app) {
  return app.rootGraph ?? app.graph;
}

// "12:7" is node 7 in the subgraph of node 12; null where the page shows another workflow by now
export function nodeOfExecution(app, workflow, execution) {
  const root = rootOf(app);
  if (!root || (workflow && root.id && workflow !== root.id)) return null;
  let graph = root;
  const path = String(execution).split(":");
  const last = path.pop();
  for (const id of path) {
    graph = graph?.getNodeById(id)?.subgraph ?? graph?.getNodeById(Number(id))?.subgraph;
  }
  return graph?.getNodeById(last) ?? graph?.getNodeById(Number(last)) ?? null;
}

export function remember(kind, detail) {
  // a prompt without a workflow belongs to no page
  if (!detail.workflow) return;
  const key = `${kind}|${detail.workflow}|${detail.node}`;
  told.delete(key); // the newest is the last
  told.set(key, [kind, detail]);
}

// [{node, detail}, ...] of the nodes of the workflow that the page shows, the newest last
export function allRemembered(app, kind) {
  return [...told.values()]
    .filter(([about]) => about === kind)
    .map(([, detail]) => ({ node: nodeOfExecution(app, detail.workflow, detail.node), detail }))
    .filter(({ node }) => node);
}

// of a node made anew: after a change of the tab, an undo, a step into a subgraph
export function remembered(app, kind, node) {
  return allRemembered(app, kind).findLast((found) => found.node === node)?.detail ?? null;
}

// the node of this class that a MODEL wire comes from, however many other nodes it passes
export function upstream(node, comfyClass) {
  const seen = new Set();
  let current = node;
  while (current && !seen.has(current)) {
    if (current.comfyClass === comfyClass) return current;
    seen.add(current);
    const slot = (current.inputs ?? []).findIndex((input) => input.type === "MODEL" || current.inputs.length === 1);
    current = slot < 0 ? null : current.getInputNode(slot);
  }
  return null;
}
