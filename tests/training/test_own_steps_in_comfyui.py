"""What SLA2 Train LoRA trains step by step is what ComfyUI's sampling meets."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_states_are_those_of_an_euler_sampling_through_sla2(comfyui_path, comfy_scripts, tmp_path):
    """Of pure noise at cfg 1 whose levels begin below 1, and of an image-to-video model with guidance and another shift."""
    if "force_deepcopy" not in (Path(comfyui_path) / "comfy/model_patcher.py").read_text(encoding="utf-8"):
        pytest.skip("SLA2 Train LoRA needs ComfyUI 0.25")
    done = comfy_scripts.run(Path(__file__).with_name("own_steps_probe.py"), ROOT, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for found in json.loads(done.stdout.splitlines()[-1]):
        assert len(found["sparse"]) == 3 and max(found["sparse"]) < 1e-5
        # the noise is the same, the steps from there on are not
        assert found["dense"][0] < 1e-6 and min(found["dense"][1:]) > 1e-3
