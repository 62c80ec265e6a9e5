"""SLA2 Train Router on the classes that people run: text, sound and references around the video are no obstacle."""

import json
from pathlib import Path

import pytest

from tooling.paths import ROOT

FAMILIES = {"minimax-h3": "minimax-h3", "ltx-2": "ltx-2", "ltx-video guides": "ltx-video", "wan fun reference": "wan"}


@pytest.fixture(scope="module")
def found(comfyui_path, comfy_scripts, tmp_path_factory):
    script = Path(__file__).with_name("router_training_probe.py")
    done = comfy_scripts.run(script, comfyui_path, ROOT, tmp_path_factory.mktemp("routers"), *FAMILIES)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_is_trained_and_its_file_runs(found, name):
    one = found[name]
    if one.get("missing"):
        pytest.skip("this ComfyUI does not have the model")
    layers = range(one["layers"])
    assert one["family"] == FAMILIES[name] and one["untrained"] == {}
    assert one["steps"] == {str(layer): 8 for layer in layers} and one["measured"] == list(layers)
    assert all(one["ratios"]) and min(one["moved"]) > 1e-4
    assert one["sparse"] == [1 for _ in layers] and 0 < one["difference"] < 0.5


@pytest.mark.parametrize("name", FAMILIES)
def test_its_model_goes_with_the_training(found, name):
    """It was in a reference cycle and went later, with the MODEL it was cloned from: ComfyUI warned of a memory leak."""
    assert found[name].get("missing") or found[name]["freed"]
