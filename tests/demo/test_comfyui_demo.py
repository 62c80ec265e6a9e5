"""The demo's path through a real ComfyUI: the command from end to end, as a CPU runs it."""

import pytest

from sla2_kernels.router import selected_block_count
from tooling.comparison import read_video
from tooling.demo_plan import plan_for

LAYERS = 9
pytestmark = pytest.mark.comfyui


def test_command_with_comfyui_leaves_two_videos_and_a_table(comfyui_demo):
    folder, results = comfyui_demo
    plan = plan_for("cpu", steps=8)  # as conftest.py asks for
    dense, sla2 = results["runs"]
    assert results["host"] == "ComfyUI" and results["tokens"] == plan.tokens
    assert dense["sparse_calls"] is None
    assert (sla2["sparse_calls"], sla2["dense_calls"], sla2["reasons"]) == (LAYERS * plan.steps, 0, {})
    kept = selected_block_count(plan.sparsity, -(-plan.tokens // 64))
    assert sla2["sparsity"] == pytest.approx(1 - kept * 64 / plan.tokens)
    assert results["latent_difference"] > 0
    for run in results["runs"]:
        assert run["sampling_s"] > 0 and run["decoding_s"] > 0
        assert (folder / run["video"]).stat().st_size > 1000
        assert read_video(folder / run["video"]).shape == (3, plan.frames, plan.height, plan.width)
    assert (folder / "comparison.png").stat().st_size > 1000
