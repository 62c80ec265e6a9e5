"""The denoising-step benchmark: what it prints, how it splits a step, and one run on ComfyUI's classes at tiny size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import breakdown, collect_comfyui, comfyui_step

ROOT = Path(__file__).resolve().parents[2]


def test_nested_spans_become_parts_that_add_up():
    spent = {
        "model call": 100.0,
        "self-attention block": 60.0,
        "self-attention": 40.0,
        "q, k, v and output projections": 10.0,
        "q and k norms": 4.0,
        "cross-attention block": 12.0,
        "cross-attention": 5.0,
        "feed-forward": 20.0,
    }
    parts = breakdown.disjoint(spent)
    assert sum(parts.values()) == pytest.approx(100.0)
    assert parts["rotation of q and k, rest of the self-attention block"] == 6.0
    assert parts["norms, modulation, embeddings, head"] == 8.0


def test_the_table_compares_with_the_default():
    rows = [
        {
            "variant": "dense",
            "seconds_per_step": 2.0,
            "peak_bytes": 2**30,
            "parts": {"self-attention": 900.0},
            "kernels": [],
        },
        {"variant": "SLA2", "seconds_per_step": 0.5, "parts": {"self-attention": 50.0}, "kernels": []},
    ]
    text = comfyui_step.markdown(rows)
    assert "| dense | 2.000 | 1.00x | 1.0 GiB |" in text
    assert "| SLA2 | 0.500 | 4.00x | - |" in text
    assert "| self-attention | 900.0 | 50.0 |" in text


def test_unknown_models_are_refused(capsys):
    with pytest.raises(SystemExit):
        comfyui_step.parse(["--runs", "99B-480p"])
    assert "is no MODEL-RESOLUTION" in capsys.readouterr().err


def test_collecting_from_a_folder_that_is_no_comfyui_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no ComfyUI checkout"):
        collect_comfyui.collect(tmp_path, tmp_path / "out")


@pytest.mark.slow
def test_a_step_of_comfyuis_own_classes_from_a_collected_folder(comfyui_path, tmp_path):
    """Collects ComfyUI into a small folder, samples a tiny Wan from there, dense and through the pack's own hook."""
    run = {"cwd": ROOT, "check": True, "stdin": subprocess.DEVNULL, "env": {**os.environ, "OMP_NUM_THREADS": "2"}}
    module = [sys.executable, "-m"]
    subprocess.run([*module, "benchmarks.collect_comfyui", str(tmp_path / "c"), "--comfyui", str(comfyui_path)], **run)
    size = sum(file.stat().st_size for file in (tmp_path / "c").rglob("*") if file.is_file())
    assert size < 20e6
    command = [
        *module,
        "benchmarks.comfyui_step",
        "--comfyui",
        str(tmp_path / "c"),
        "--runs",
        "tiny-tiny",
        "--steps",
        "1",
    ]
    command += ["--default-only", "--device", "cpu", "--out", str(tmp_path / "step.json")]
    subprocess.run(command, **run)
    dense, *sparse = json.loads((tmp_path / "step.json").read_text())["rows"]
    assert dense["variant"].startswith("dense") and "sparse_calls" not in dense
    assert [row["variant"].split(", ")[-1] for row in sparse] == ["fitted ratio", "estimated ratio", "fixed ratio"]
    # 2 layers, 2 steps
    assert [(row["sparse_calls"], row["dense_calls"]) for row in sparse] == [(4, 0)] * 3
    assert sparse[0]["tokens"] == 864
