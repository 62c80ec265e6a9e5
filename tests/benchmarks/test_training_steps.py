"""The script that times whole stage 2 steps: each way and attention at tiny size, and the share in its table."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import training_steps
from benchmarks.training_steps import ATTENTIONS, Free, markdown


def attentions(path):
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert all(row["seconds_per_step"] > 0 and len(row["losses"]) == 2 for row in rows)
    assert all(0 < loss < 1 for row in rows for loss in row["losses"])
    return {row["attention"]: row["losses"] for row in rows}


def test_steps_in_comfyui(comfyui_path, comfy_scripts, tmp_path):
    if "force_deepcopy" not in (Path(comfyui_path) / "comfy/model_patcher.py").read_text(encoding="utf-8"):
        pytest.skip("SLA2 Train LoRA needs ComfyUI 0.25 or newer")
    out = tmp_path / "steps.json"
    options = ["--comfyui", comfyui_path, "--ways", "comfyui", "--tiny", "--device", "cpu", "--out", out]
    done = comfy_scripts.run("-m", "benchmarks.training_steps", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    found = attentions(out)
    assert list(found) == list(ATTENTIONS) and found["SLA2"] != found["dense"]


def test_steps_through_accelerate(tmp_path, capsys):
    for package in ("accelerate", "diffusers", "peft"):
        pytest.importorskip(package)
    out = tmp_path / "steps.json"
    training_steps.main(["--ways", "accelerate", "--tiny", "--device", "cpu", "--out", str(out)])
    found = attentions(out)
    assert list(found) == list(ATTENTIONS) and found["SLA2"] != found["dense"]
    assert "| accelerate | tiny, 2 of 2 layers, 144 tokens | distill | SLA2 |" in capsys.readouterr().out


def test_free_attention_is_v_and_gives_q_k_and_v_a_gradient():
    q, k, v = (torch.randn(2, 3, requires_grad=True) for _ in range(3))
    out = Free.apply(q, k, v)
    assert torch.equal(out, v) and all(torch.equal(g, v) for g in torch.autograd.grad(out, (q, k, v), v))


def test_attention_s_share_is_of_the_step_without_it():
    def row(attention, seconds):
        about = {"part": "comfyui 14B flow", "way": "comfyui", "model": "14B", "loss": "flow", "tokens": 32760}
        layers = {"layers": 3, "layers_of_model": 40, "peak_bytes": 2**31}
        return about | layers | {"attention": attention, "seconds_per_step": seconds}

    lines = markdown([row("none", 0.5), row("SLA2", 1.0), row("dense", 2.0)]).splitlines()
    start = "| comfyui | 14B, 3 of 40 layers, 32,760 tokens | flow"
    assert lines[-2:] == [
        f"{start} | SLA2 | 1.000 | 2.00x | 50% | 2.0 |",
        f"{start} | dense | 2.000 | 1.00x | 75% | 2.0 |",
    ]
