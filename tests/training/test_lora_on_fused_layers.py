"""ComfyUI 0.39's linear layers take the activation before and the residual after along: a LoRA must be added in between."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def found(comfy_scripts):
    done = comfy_scripts.run(Path(__file__).with_name("fused_layers.py"), ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_lora_is_added_between_activation_and_residual(found):
    assert found["with"] < 1e-5 and found["plain"] < 1e-5 and found["off"]
    assert "the activation mish, which this ComfyUI does not offer" in found["unknown"]


def test_a_model_that_overwrites_what_gradients_need_is_named(found):
    """As ComfyUI's LTX-Video, HunyuanVideo and Flux do."""
    assert found["overwritten"].startswith(
        "ValueError: SLA2 Train LoRA: ComfyUI's Overwriting cannot be trained: it overw"
    )
    assert found["other"].startswith("RuntimeError: element 0 of tensors does not require grad")
