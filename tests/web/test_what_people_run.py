"""Our own workflows on tiny files, queued from the page: with SLA2, then dense; no node covers another, before and after."""

import itertools
import json
import re
import shutil

import pytest
from canvas import MESSAGE
from tiny_runs import make_images, stand_in

from tooling import graph
from tooling.paths import ROOT
from tooling.recipes import RECIPES
from tooling.recipes.cards import CARDS

pytestmark = pytest.mark.web
PROMPT = "(await app.graphToPrompt()).output"
# what the page sends to the server from now on; null: what it would send by itself
INSTEAD = """((api) => {
  api.realQueuePrompt ??= api.queuePrompt.bind(api);
  api.queuePrompt = (number, data, ...rest) => api.realQueuePrompt(number, a ? { ...data, output: a } : data, ...rest);
})(app.api)"""
# [title, left, top, right, bottom] of every node, in Nodes 2.0 as it is on the screen
BOXES = """(async () => {
  const scale = 0.1;
  app.canvas.ds.scale = scale;
  app.canvas.ds.offset = [400, 800];
  app.canvas.setDirty(true, true);
  await new Promise((done) => setTimeout(done, 500));
  return app.rootGraph.nodes.map((node) => {
    const [x, y, width, height] = [...node.pos, ...node.size];
    const drawn = document.querySelector(`[data-node-id="${node.id}"]`)?.getBoundingClientRect();
    if (!drawn) return [node.title, x, y - LiteGraph.NODE_TITLE_HEIGHT, x + width, y + height];
    return [node.title, ...[drawn.left, drawn.top, drawn.right, drawn.bottom].map((side) => Math.round(side / scale))];
  });
})()"""
# by the first word of the workflow's name; tokens: 2 x 8 x 8, for LTX 3 x 8 x 8 at full size
SIZES = {
    "MiniMax": {"width": 256, "height": 256, "length": 5},
    "LTX": {"width": 128, "height": 128, "length": 17, "frames_number": 17},
    "Wan": {"width": 128, "height": 128, "length": 5},
    "wan2.1": {"width": 128, "height": 128, "length": 5, "steps": 2},
    "miniature": {"width": 128, "height": 128, "length": 5, "steps": 2},
}
OTHERS = sorted(path.stem for path in (ROOT / "workflows").glob("*.json") if path.stem not in RECIPES)


def tiny(prompt, name):
    """The page's prompt at a tiny size, with stand-ins, never too short for SLA2."""
    sizes, made = SIZES[re.split("[-_ ]", name)[0]], {}
    for key, node in prompt.items():
        inputs = {name: sizes.get(name, value) for name, value in stand_in(node)["inputs"].items()}
        made[key] = {
            "class_type": stand_in(node)["class_type"],
            "inputs": inputs | ({"minimum_tokens": 0} if "minimum_tokens" in inputs else {}),
        }
    return made


def covered(boxes):
    """[(title, title)] of the nodes that lie on each other."""
    return [
        (one[0], other[0]) for one, other in itertools.combinations(boxes, 2)
        if one[1] < other[3] and other[1] < one[3] and one[2] < other[4] and other[2] < one[4]
    ]  # fmt: skip


def covered_in_both_renderers(canvas):
    found = []
    for vue in (False, True):
        canvas.look(vue=vue)
        found += covered(canvas.js(BOXES))
    canvas.look(vue=False)
    return found


def dense(prompt):
    """The prompt with every switch off, without what decodes and saves."""
    off = {"ComfySwitchNode": "switch", "PrimitiveBoolean": "value"}
    made = {}
    for key, node in prompt.items():
        kind, inputs = node["class_type"], node["inputs"]
        changed = {off[kind]: False} if kind in off and not isinstance(inputs[off[kind]], list) else {}
        if kind != "SaveVideo":
            made[key] = {"class_type": kind, "inputs": inputs | changed}
    return made


def load(canvas, name):
    canvas.load(json.loads((ROOT / f"workflows/{name}.json").read_text(encoding="utf-8")))
    assert covered_in_both_renderers(canvas) == []


def run_in_page(comfy, canvas, name):
    """(prompt, outputs) of the workflow that the page shows, at a tiny size."""
    prompt = tiny(canvas.js(PROMPT), name)
    make_images(comfy.base / "input", prompt)
    canvas.js(INSTEAD, prompt)
    outputs = canvas.queue()["outputs"]
    canvas.js(INSTEAD, None)
    assert covered_in_both_renderers(canvas) == []
    assert "skips" in canvas.panel("SLA2ApplyAttention")
    return prompt, outputs


@pytest.mark.parametrize("name", RECIPES)
def test_what_people_run_runs_with_sla2_and_dense(comfy, canvas, tiny_files, name):
    load(canvas, name)
    prompt, outputs = run_in_page(comfy, canvas, name)
    reports, (saver,) = graph.of_class(prompt, "SLA2Report"), graph.of_class(prompt, "SaveVideo")
    assert all(comfy.report(outputs, report)["sparse_calls"] > 0 for report in reports) and outputs[saver]["images"]
    outputs = comfy.run(dense(prompt))
    assert all("did not come through SLA2 Apply Attention" in outputs[report]["text"][0] for report in reports)


def test_each_has_a_card():
    assert set(CARDS) == set(RECIPES)


@pytest.mark.parametrize("name", OTHERS)
def test_no_node_covers_another_when_it_loads(canvas, name):
    load(canvas, name)


@pytest.mark.parametrize("name", ["wan2.1_t2v_1.3b_sla2", "miniature_sla2"])
def test_no_node_covers_another_after_a_run(comfy, canvas, tiny_files, name):
    models = comfy.base / "models/diffusion_models"
    shutil.copy(models / "tiny_wan.safetensors", models / "wan2.1_t2v_1.3B_fp16.safetensors")
    load(canvas, name)
    prompt, outputs = run_in_page(comfy, canvas, name)
    assert len([saver for saver in graph.of_class(prompt, "SaveVideo") if outputs[saver]["images"]]) == 2


def test_the_menu_finds_sla2_behind_the_switch(canvas):
    canvas.load(json.loads((ROOT / "workflows/Wan 2.2 image to video.json").read_text(encoding="utf-8")))
    before = canvas.js(PROMPT)
    canvas.alerts()
    canvas.js("app.extensionManager.command.execute('SLA2.Accelerate')")
    canvas.page.wait_for_selector(MESSAGE)
    assert "SLA2 is already on 2 models" in " ".join(canvas.alerts()) and canvas.js(PROMPT) == before
