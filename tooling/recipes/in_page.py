"""A recipe as a workflow: built in ComfyUI's page, so that nodes, sockets and sizes are the page's own."""

from dataclasses import asdict

from .nodes import Wire

# pixels of height that these have after a run, in the renderer that makes them larger; width is the recipe's
AFTER_A_RUN = {
    "SLA2ApplyAttention": 440, "SLA2Report": 760, "SaveVideo": 560, "LoadImage": 420, "MarkdownNote": 470,
    "MiniMaxH3ImageToVideo": 360, "MiniMaxH3ReferenceToVideo": 480, "CLIPTextEncode": 180,
}  # fmt: skip
GAP_X, GAP_Y, TITLE = 80, 40, 30

BUILD = """async ([columns, tall, gapX, gapY, title]) => {
  app.rootGraph.clear();
  const made = new Map();
  for (const spec of columns.flat()) {
    const node = LiteGraph.createNode(spec.kind);
    if (!node) throw new Error(`this ComfyUI has no node ${spec.kind}`);
    app.rootGraph.add(node);
    made.set(spec.key, node);
    if (spec.title) node.title = spec.title;
    if (spec.models.length) node.properties.models = spec.models;
    for (const [name, value] of spec.values) {
      const widget = name ? node.widgets.find((candidate) => candidate.name === name) : node.widgets[0];
      if (!widget) throw new Error(`${spec.kind} has no widget ${name}`);
      widget.value = value;
      widget.callback?.(value, app.canvas, node);
    }
  }
  for (const spec of columns.flat()) {
    for (const [name, from, output] of spec.wires) {
      const node = made.get(spec.key);
      const slot = node.inputs.findIndex((input) => input.name === name);
      if (slot < 0) throw new Error(`${spec.kind} has no input ${name}, but ${node.inputs.map((input) => input.name)}`);
      if (!made.get(from).connect(output, node, slot)) throw new Error(`${from} does not fit ${spec.kind}'s ${name}`);
    }
  }
  let x = 0;
  for (const column of columns) {
    let y = 0;
    for (const spec of column) {
      const node = made.get(spec.key);
      node.size = [spec.width, Math.max(node.computeSize()[1], tall[spec.kind] ?? 0)];
      node.pos = [x, y];
      y += node.size[1] + gapY + title;
    }
    x += Math.max(...column.map((spec) => spec.width)) + gapX;
  }
}"""


def build(page, recipe):
    """Makes ``recipe`` the page's workflow; raises Playwright's error with one sentence where a node or an input is missing."""
    columns = [[described(node) for node in column] for column in recipe]
    page.evaluate(BUILD, [columns, AFTER_A_RUN, GAP_X, GAP_Y, TITLE])


def described(node):
    wires = [[name, *asdict(value).values()] for name, value in node.inputs.items() if isinstance(value, Wire)]
    values = [[name, value] for name, value in node.inputs.items() if not isinstance(value, Wire)]
    return {"key": node.key, "kind": node.kind, "title": node.title, "models": node.models, "width": node.width,
            "wires": wires, "values": values}  # fmt: skip
