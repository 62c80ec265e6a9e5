"""One run of the demo in ComfyUI, for the tests that look at what it leaves."""

import json
import os
import subprocess
import sys

import pytest

from tooling.paths import ROOT

STEPS = 8  # of the demo's 20: its videos are right with so few, in half of the time


def run_demo(folder, *options, **variables):
    """Results of the demo's command with the interpreter that runs the tests."""
    command = [sys.executable, str(ROOT / "demo.py"), "--here", "--output", str(folder), *options]
    environment = os.environ | variables
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="session")
def comfyui_demo(comfyui_path, tmp_path_factory):
    """(folder, results) of the demo in ComfyUI at a CPU's size."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, run_demo(folder, "--steps", str(STEPS), COMFYUI_PATH=str(comfyui_path))


@pytest.fixture(scope="session")
def diffusers_demo(tmp_path_factory):
    """(folder, results) of the demo with diffusers at a CPU's size."""
    pytest.importorskip("diffusers.models")
    folder = tmp_path_factory.mktemp("demo")
    return folder, run_demo(folder, "--diffusers")
