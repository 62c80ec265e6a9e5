"""ComfyUI 0.39's linear layers take the activation before and the residual after along: a LoRA must be added in between."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_lora_is_added_between_activation_and_residual(comfy_scripts):
    done = comfy_scripts.run(Path(__file__).with_name("fused_layers.py"), ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["with"] < 1e-5 and found["plain"] < 1e-5 and found["off"]
    assert "the activation mish, which this ComfyUI does not offer" in found["unknown"]
