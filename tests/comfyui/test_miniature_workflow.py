"""The miniature's workflow as it is bundled, with the trained weights that came with the clone: only with fewer steps."""

import json

import pytest

from miniature.weight_files import KINDS, weight_file
from tooling import graph
from tooling.checkpoint import DIT, VAE
from tooling.comparison import read_video
from tooling.paths import ROOT

LAYERS, STEPS = 9, 4
pytestmark = pytest.mark.skipif(
    not (weight_file(DIT).exists() and weight_file(VAE).exists()),
    reason="the miniature's weights are not in miniature/weights",
)


@pytest.fixture
def prompt(comfy):
    workflow = json.loads((ROOT / "workflows" / "First look, nothing to download.json").read_text(encoding="utf-8"))
    made = graph.to_prompt(workflow, comfy.server.get("/object_info"))
    for node in graph.of_class(made, "KSampler"):
        made[node]["inputs"]["steps"] = STEPS
    return made


def test_two_red_things_over_a_grey_floor_dense_and_sparse(comfy, prompt):
    outputs = comfy.run(prompt)
    (report,) = graph.of_class(prompt, "SLA2Report")
    found = comfy.report(outputs, report)
    assert (found["sparse_calls"], found["dense_calls"]) == (STEPS * LAYERS, 0) and found["notes"] == []
    for node in graph.of_class(prompt, "SaveVideo"):
        (saved,) = (
            entry
            for listed in outputs[node].values()
            if isinstance(listed, list)
            for entry in listed
            if isinstance(entry, dict) and "filename" in entry
        )
        video = read_video(comfy.base / "output" / saved["subfolder"] / saved["filename"])
        assert video.shape == (3, 81, 128, 208)
        red = (video[0] - video[1].maximum(video[2]) > 0.4).float().mean().item()
        floor = ((video.amax(0) - video.amin(0)) < 0.25).float().mean().item()
        assert 0.01 < red < 0.35 and floor > 0.5, graph.branch_of(prompt, node)


def test_each_file_is_listed_by_the_loaders_of_its_kind_alone(comfy):
    """Every file was in the lists of all four kinds, and the first of some became what a new node loads."""
    mine = comfy.base / "models/vae/mine" / VAE
    mine.parent.mkdir(parents=True)
    mine.touch()
    listed = {kind: comfy.server.get(f"/models/{kind}") for kind in (*KINDS.values(), "checkpoints", "text_encoders")}
    mine.unlink()
    mine.parent.rmdir()
    for name, kind in KINDS.items():
        assert [where for where, files in listed.items() if name in files] == [kind]
    # a user's own file of the same name keeps its own
    assert [name for name in listed["vae"] if "wan_miniature" in name] == [f"mine/{VAE}", VAE]
