"""Our own workflows on tiny files, queued from the page: with SLA2, then dense; no node covers another, before and after."""

import itertools
import json
import shutil

import pytest
from canvas import MESSAGE, REST
from tiny_runs import make_images, stand_in

from tooling import graph
from tooling.paths import ROOT
from tooling.recipes import RECIPES

pytestmark = pytest.mark.web
# what the page sends to the server from now on; null: what it would send by itself
INSTEAD = """((api) => {
  api.realQueuePrompt ??= api.queuePrompt.bind(api);
  api.queuePrompt = (number, data, ...rest) => api.realQueuePrompt(number, a ? { ...data, output: a } : data, ...rest);
})(app.api)"""
# [title, left, top, right, bottom] of every node, in Nodes 2.0 as it is on the screen
BOXES = f"""(async () => {{
  const scale = 0.1;
  app.canvas.ds.scale = scale;
  app.canvas.ds.offset = [400, 800];
  app.canvas.setDirty(true, true);
  await {REST};
  return app.rootGraph.nodes.map((node) => {{
    const [x, y, width, height] = [...node.pos, ...node.size];
    const drawn = document.querySelector(`[data-node-id="${{node.id}}"]`)?.getBoundingClientRect();
    if (!drawn) return [node.title, x, y - LiteGraph.NODE_TITLE_HEIGHT, x + width, y + height];
    return [node.title, ...[drawn.left, drawn.top, drawn.right, drawn.bottom].map((side) => Math.round(side / scale))];
  }});
}})()"""
# by how the workflow's name begins; tokens: 2 x 8 x 8, for LTX 3 x 8 x 8 at full size
SMALL = {"width": 128, "height": 128, "length": 5}
SIZES = {
    "MiniMax": {"width": 256, "height": 256, "length": 5},
    "LTX": SMALL | {"length": 17, "frames_number": 17},
    "Wan 2.2": SMALL,
    "Wan 2.1": SMALL | {"steps": 2},
    "First": SMALL | {"steps": 2},
}
VIDEO_HEIGHT = 560  # of a node that shows one, in the renderer that makes it larger
# what nodes of ours show after a run of a large model, as the server tells it
SHOWN = """((node) => {
  const layers = Array.from({ length: 40 }, (_, layer) => ({ layer, sparse: 27, dense: { "the schedule keeps this step dense": 3 },
    sparsity: 0.9, attention_error: 0.12, milliseconds: { sparse: 1, dense: 9 } }));
  const file = { filename: "x", subfolder: "", type: "temp" };
  const maps = { layers: [0], steps: [0], tokens: 32760, frames: 21, tile: [8, 8], file };
  const rows = Array(12).fill(["seconds per step, ComfyUI's own sparse attention", "0.123 (9 of 9 calls accelerated)"]);
  const curves = { at: [1, 2], steps: 2, mean: [1, 0.5], low: [1, 0.4], high: [1, 0.6] };
  const headline = "saved 41 s of attention in this run · skips 90%, keeps 10% · attention error 0.12 (layers 0.08 to 0.31)";
  const reasons = Array(4).fill("120 calls ran dense: the schedule keeps this step dense, and words that need a second line");
  const outcome = { headline, detail: "1080 of 1200 attention calls accelerated · 8.2x faster per call", reasons, accelerated: 1080,
    calls: 1200, layers: 40 };
  const tell = (kind, detail) =>
    app.api.dispatchEvent(new CustomEvent(`sla2.${kind}`, { detail: { ...detail, node: String(node.id), workflow: null } }));
  if (node.comfyClass === "SLA2ApplyAttention") tell("outcome", outcome);
  if (node.comfyClass?.startsWith("SLA2Train")) tell("training", { headline, curves, caption: "mean loss over the layers" });
  if (node.comfyClass === "SLA2Report") node.onExecuted({ text: [headline], sla2_report: [{ layers }], sla2_maps: [maps] });
  if (node.comfyClass === "SLA2Compare")
    node.onExecuted({ text: [""], sla2_comparison: [{ headline, rows, break_even: 6144 }] });
})"""
OTHERS = sorted(path.stem for path in (ROOT / "workflows").glob("*.json") if path.stem not in RECIPES)


def tiny(prompt, name):
    """The page's prompt at a tiny size, with stand-ins, never too short for SLA2."""
    sizes, made = next(sizes for beginning, sizes in SIZES.items() if name.startswith(beginning)), {}
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
        (one[0], other[0])
        for one, other in itertools.combinations(boxes, 2)
        if one[1] < other[3] and other[1] < one[3] and one[2] < other[4] and other[2] < one[4]
    ]


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
    prompt = tiny(canvas.prompt(), name)
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


def test_compare_takes_a_latent_of_video_and_sound(comfy, prompt, tiny_files):
    model = prompt.apply(prompt.model("minimax_h3_fl2va_pruned_int8_convrot.safetensors"))
    clip = prompt.add("SLA2TestTextEncoder", family="minimax")
    vae = prompt.add("VAELoader", vae_name="minimax_h3_video_vae_int8_convrot.safetensors")
    text, _ = prompt.add("MiniMaxH3ImageToVideo", prompt="a fox", clip=clip, vae=vae, **SIZES["MiniMax"])
    sampler = {"seed": 1, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
    inputs = {"model": model, "positive": [text, 0], "negative": [text, 0], "latent_image": [text, 1], "vae": vae}
    compare, _ = prompt.add("SLA2Compare", find_break_even=False, **inputs, **sampler)
    outputs = comfy.run(prompt)
    rows = dict(outputs[compare]["sla2_comparison"][0]["rows"])
    assert 0 < float(rows["latent error, relative to dense"]) < 1
    assert rows["seconds per step, SLA2"].endswith("(4 of 4 calls accelerated)")
    assert len(outputs[compare]["sla2_frames"][0]["sla2"]) == 5


@pytest.mark.parametrize("name", OTHERS)
def test_no_node_covers_another_before_and_after_a_run(canvas, name):
    """After a run as far as our nodes go: they are told what a server tells."""
    load(canvas, name)
    for vue in (False, True):
        canvas.look(vue=vue)
        canvas.js(BOXES)  # in Nodes 2.0 only what was in view is there
        canvas.js(f"app.rootGraph.nodes.forEach({SHOWN})")
        boxes = canvas.js(BOXES)
        videos = [[*box[:4], box[2] + VIDEO_HEIGHT] for box in boxes if box[0].startswith("Save Video")]
        assert covered([box for box in boxes if not box[0].startswith("Save Video")] + videos) == []
    canvas.look(vue=False)


@pytest.mark.parametrize("name", ["Wan 2.1 text to video", "First look, nothing to download"])
def test_no_node_covers_another_after_a_run(comfy, canvas, tiny_files, name):
    models = comfy.base / "models/diffusion_models"
    shutil.copy(models / "tiny_wan.safetensors", models / "wan2.1_t2v_1.3B_fp16.safetensors")
    load(canvas, name)
    prompt, outputs = run_in_page(comfy, canvas, name)
    assert len([saver for saver in graph.of_class(prompt, "SaveVideo") if outputs[saver]["images"]]) == 2


def test_the_menu_finds_sla2_behind_the_switch(canvas):
    canvas.load(json.loads((ROOT / "workflows/Wan 2.2 image to video.json").read_text(encoding="utf-8")))
    before = canvas.prompt()
    canvas.alerts()
    canvas.js("app.extensionManager.command.execute('SLA2.Accelerate')")
    canvas.page.wait_for_selector(MESSAGE)
    assert "SLA2 is already on 2 models" in " ".join(canvas.alerts()) and canvas.prompt() == before
