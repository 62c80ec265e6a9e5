"""Official templates, with nothing changed but our nodes, on tiny files in their own formats: sampled dense, sparse and exactly.

A user's changes are made in the page: size, length, and the switch of the few-step LoRA. Models whose size ComfyUI fixes have
stand-ins; docs/FAMILIES.md names them.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch
from official_templates import sampled_models, video_templates
from tiny_runs import ENOUGH, make_images, stand_in

from tooling import graph
from tooling.paths import ROOT

pytestmark = pytest.mark.web
APPLY = "SLA2ApplyAttention"
SHOW = """((node) => {
  const widget = node.widgets.find((candidate) => candidate.name === a[1]);
  widget.value = a[2];
  widget.callback?.(a[2], app.canvas, node);
})(app.rootGraph.getNodeById(a[0]))"""


@dataclass
class Run:
    """One template.

    shown: {(node, widget): value} set in the page.
    calls: {sampler: (sparse, dense) self-attention calls}. exact: how far off from dense it may be at sparsity 0 and 16 bit.
    """

    shown: dict
    calls: dict
    exact: float
    lora: bool = True


# 2 layers; the dense first step of a run from noise is 2 calls. 8-bit integer weights round what they are multiplied with: a difference
# in the last place of the attention may move a value by a whole step of 1/127.
RUNS = {
    "video_minimax_h3_i2v": Run(
        {(105, "value"): True, (105, "value_1"): 0.9, (115, "megapixels"): 0.1}, {"105:14": (14, 2)}, 1e-2
    ),
    "video_minimax_h3_r2v": Run(
        {(146, "value"): True, (132, "value"): 0.9, (115, "megapixels"): 0.1}, {"125": (6, 2)}, 1e-2
    ),
    # half size first: 160 tokens are too few
    "video_ltx2_3_i2v": Run(
        {(320, "value_2"): 256, (320, "value_3"): 256, (320, "value_4"): 3},
        {"320:283": (0, 16), "320:308": (6, 0)},
        1e-5,
    ),
    "video_ltx2_5_i2v": Run(
        {(403, "megapixels"): 0.1, (398, "value_1"): False, (398, "value_2"): 3},
        {"398:344": (0, 16), "398:368": (6, 0)},
        1e-2,
        lora=False,
    ),
    "video_wan2_2_14B_i2v": Run(
        {(129, "value"): True, (129, "width"): 128, (129, "height"): 128, (129, "value_1"): 2},
        {"129:86": (2, 2), "129:85": (4, 0)},
        1e-5,
    ),
}


def prompts_of(canvas, name):
    """(prompt, the same with SLA2) of a template, as the page sends them."""
    canvas.load(video_templates()[name])
    for (node, widget), value in RUNS[name].shown.items():
        canvas.js(SHOW, [node, widget, value])
    plain = canvas.prompt()
    canvas.js("app.extensionManager.command.execute('SLA2.Accelerate')")
    return plain, canvas.prompt()


def watched(prompt, run, tag, settings, video=False):
    """``prompt`` with stand-ins and ``settings`` of ours; every sampler's latent is kept, and reported where SLA2 is on it."""
    made = {name: stand_in(node) for name, node in prompt.items()}
    for name in graph.of_class(made, APPLY):
        made[name] = {"class_type": APPLY, "inputs": made[name]["inputs"] | {"minimum_tokens": ENOUGH} | settings}
    if not video:
        made = {name: node for name, node in made.items() if node["class_type"] not in ("SaveVideo", "PreviewAny")}
    for sampler in run.calls:
        samples, inputs = [sampler, 0], made[sampler]["inputs"]
        kept = {"samples": samples, "name": kept_name(tag, sampler)}
        made[f"kept {sampler}"] = {"class_type": "SLA2TestKeepLatent", "inputs": kept}
        model = inputs.get("model") or made[inputs["guider"][0]]["inputs"]["model"]
        if made[model[0]]["class_type"] == APPLY:
            made[f"report {sampler}"] = {"class_type": "SLA2Report", "inputs": {"model": model, "samples": samples}}
    return made


def kept_name(tag, sampler):
    return f"{tag}_{sampler.replace(':', '_')}.safetensors"


def kept(comfy, tag, sampler):
    parts = safetensors.torch.load_file(comfy.base / "output" / kept_name(tag, sampler))
    return torch.cat([parts[name].flatten() for name in sorted(parts)])


def quantised_models(comfy):
    """How many models the server has loaded so far whose file has quantised layers."""
    return Path(comfy.server.log).read_text(errors="replace").count("Using mixed precision operations")


@pytest.mark.usefixtures("small_window")
@pytest.mark.parametrize("name", RUNS)
def test_it_samples_through_its_own_loaders_guider_and_lora(comfy, canvas, tiny_files, name):
    run, before = RUNS[name], quantised_models(comfy)
    plain, accelerated = prompts_of(canvas, name)
    make_images(comfy.base / "input", plain)
    wires = sampled_models(accelerated, comfy.server.get("/object_info"))
    assert wires and {accelerated[source]["class_type"] for _, source in wires} == {APPLY}

    comfy.run(watched(plain, run, f"{name}_dense", {}))
    sparse = comfy.run(watched(accelerated, run, f"{name}_sparse", {}, video=True))
    exactly = {"preset": "custom", "sparsity": 0.0, "bit_width": "16bit"}
    exact = comfy.run(watched(accelerated, run, f"{name}_exact", exactly))

    assert quantised_models(comfy) - before == len(graph.of_class(plain, "UNETLoader", "CheckpointLoaderSimple"))
    assert all(sparse[saver]["images"] for saver in graph.of_class(plain, "SaveVideo"))
    for sampler, (on, off) in run.calls.items():
        found, text = comfy.report(sparse, f"report {sampler}"), sparse[f"report {sampler}"]["text"][0]
        assert (found["sparse_calls"], found["dense_calls"]) == (on, off), text
        assert bool(re.search(r"also on this model: LoRA on \d+ weights", text)) == run.lora
        found = comfy.report(exact, f"report {sampler}")
        assert found["sparse_calls"] == (on + off if on else 0)
        dense, *others = (kept(comfy, f"{name}_{tag}", sampler) for tag in ("dense", "sparse", "exact"))
        off_sparse, off_exact = (((other - dense).norm() / dense.norm()).item() for other in others)
        print(
            f"\n{name} {sampler}: {on} of {on + off} sparse, off by {off_sparse:.1e}, at sparsity 0 by {off_exact:.1e}"
        )
        assert off_exact < run.exact and (off_sparse > off_exact) == bool(on)


def test_the_document_has_the_counts():
    lines = (
        (ROOT / "docs/FAMILIES.md").read_text(encoding="utf-8").split("### Templates that were sampled")[1].splitlines()
    )
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| video_")]
    found = {cells[0].split(",")[0]: re.findall(r"(\d+) of (\d+)", cells[2]) for cells in rows}
    counts = {name: [(str(on), str(on + off)) for on, off in run.calls.values()] for name, run in RUNS.items()}
    assert found == counts
