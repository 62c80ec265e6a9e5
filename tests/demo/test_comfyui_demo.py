"""The demo's path through a real ComfyUI: the command from end to end, at its smallest size."""

import json
import os
import subprocess
import sys

import pytest

from tooling.comparison import read_video
from tooling.plan import ROOT

pytestmark = pytest.mark.comfyui


def test_command_with_comfyui_leaves_two_videos_and_a_table(comfyui_path, tmp_path):
    command = [sys.executable, str(ROOT / "demo.py"), "--here", "--tiny", "--output", str(tmp_path / "out")]
    environment = {**os.environ, "COMFYUI_PATH": str(comfyui_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    dense, sla2 = results["runs"]
    assert results["host"] == "ComfyUI" and results["tokens"] == 192
    assert dense["sparse_calls"] is None
    assert sla2["sparse_calls"] > 0 and sla2["dense_calls"] == 0 and sla2["reasons"] == {}
    assert sla2["sparsity"] == pytest.approx(2 / 3)
    assert results["latent_difference"] > 0
    for run in results["runs"]:
        assert run["sampling_s"] > 0 and run["decoding_s"] > 0
        assert (tmp_path / "out" / run["video"]).stat().st_size > 1000
        assert read_video(tmp_path / "out" / run["video"]).shape == (3, 9, 128, 128)
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 1000
