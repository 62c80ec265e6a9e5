"""SLA2 with ComfyUI's MultiGPU CFG Split: each of two devices, here both the CPU, computes its half of guidance."""

import json
from pathlib import Path

import pytest
from tiny_wan import LAYERS, save_router, save_wan

from tooling.paths import ROOT

HERE = Path(__file__).parent
STEPS = 10
HALVES = 2


@pytest.fixture(scope="module")
def probe(comfyui_path, comfy_scripts, tmp_path_factory):
    """What multigpu_probe.py found: one device alone, and two with SLA2 before and after the node that splits."""
    folder = tmp_path_factory.mktemp("multigpu")
    save_wan(folder / "wan.safetensors")
    save_router(folder / "router.safetensors")
    files = folder / "wan.safetensors", folder / "router.safetensors"
    done = comfy_scripts.run(HERE / "multigpu_probe.py", comfyui_path, ROOT, *files)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    if found is None:
        pytest.skip("this ComfyUI has no MultiGPU")
    return found


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("ratio", ["learned", "fitted"])
def test_the_report_adds_up_both_devices(probe, ratio, order):
    alone, both = probe[ratio]["alone"], probe[ratio][order]
    calls = HALVES * STEPS * LAYERS
    assert both["calls by thread"] == [calls // 2] * 2 and alone["calls by thread"] == [calls // 2]
    assert (both["sparse"], both["dense"], both["model calls"], both["runs"]) == (calls, 0, HALVES * STEPS, 1)
    assert both["pairs"] == alone["pairs"] and both["skipped"] == alone["skipped"]
    assert both["notes"] == alone["notes"]
    assert both["text"].startswith(f"SLA2: {calls} of {calls} self-attention calls ran sparse")


@pytest.mark.parametrize("order", ["before", "after"])
def test_learned_ratios_give_the_latents_of_one_device(probe, order):
    assert probe["learned"][order]["apart"] < 1e-5


@pytest.mark.parametrize("order", ["before", "after"])
def test_each_device_fits_the_ratios_that_one_device_fits_for_its_half(probe, order):
    alone, both = probe["fitted"]["alone"], probe["fitted"][order]
    assert len(both["ratios"]) == len(alone["ratios"]) == HALVES * LAYERS * 3  # steps 0, 4 and 8
    for mine, one in zip(both["ratios"], alone["ratios"], strict=True):
        assert mine == pytest.approx(one, abs=1e-4)
    assert both["attention error"] == pytest.approx(alone["attention error"], rel=1e-3)
    # between the fits one device takes the mean of both halves, two each their own
    assert 0 < both["apart"] < 1e-3
