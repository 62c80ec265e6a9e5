"""The benchmark of MultiGPU CFG Split at tiny size: what it counts on one device and on two that are both the CPU."""

import json

import pytest

from benchmarks import comfyui_multigpu


def test_both_ways_on_one_device_and_on_two(comfyui_path, comfy_scripts, tmp_path):
    out = tmp_path / "multigpu.json"
    options = ["--comfyui", comfyui_path, "--device", "cpu", "--tiny", "--steps", 1, "--out", out]
    done = comfy_scripts.run("-m", "benchmarks.comfyui_multigpu", *options)
    if "No module named 'comfy.multigpu'" in done.stderr:
        pytest.skip("this ComfyUI has no MultiGPU")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [(row["GPUs"], row["way"]) for row in rows] == [(1, "dense"), (1, "SLA2"), (2, "dense"), (2, "SLA2")]
    # 2 steps of 2 layers; on one device both halves of guidance are one call
    assert [(row["sparse"], row["dense"]) for row in rows if row["way"] == "SLA2"] == [(4, 0), (8, 0)]
    assert all(row["error"] < 1e-5 for row in rows)
    assert "| 2 | SLA2 |" in done.stdout


def test_one_gpu_is_refused_in_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(SystemExit):
        comfyui_multigpu.parse(["--device", "cuda"])
    assert "compares two GPUs with one, and PyTorch sees 1." in capsys.readouterr().err
