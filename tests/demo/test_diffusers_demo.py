"""The demo's path without ComfyUI: the converted checkpoint, and the command from end to end."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("diffusers.models")  # tests/diffusers alone would pass for the package
pytest.importorskip("PIL")

from miniature.captions import embed
from miniature.sample import load_models, noise_schedule
from miniature.vae import denormalise_latents
from tooling import diffusers_demo
from tooling.checkpoint import find_or_make
from tooling.paths import ROOT


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    return find_or_make(folder, trained=folder / "none")


@pytest.fixture(scope="module")
def ours(checkpoint):
    return load_models(checkpoint.dit.parent)


@torch.no_grad()
def test_converted_transformer_computes_what_the_checkpoint_means(checkpoint, ours):
    theirs = diffusers_demo.load_transformer(checkpoint.dit)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 16, 3, 8, 10, generator=generator)
    t, context = torch.tensor([431.0]), embed("two red balls bounce over tiles, camera still")
    expected = ours[0](x, t, context)
    found = theirs(x, t, context, return_dict=False)[0]
    assert ((found - expected).norm() / expected.norm()).item() < 1e-4


@torch.no_grad()
def test_converted_vae_decodes_what_the_checkpoint_means(checkpoint, ours):
    latents = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(4))
    found, seconds = diffusers_demo.decode(diffusers_demo.load_vae(checkpoint.vae), latents, "dense")
    expected = ours[1].decode(denormalise_latents(latents))[0]
    assert found.shape == (3, 5, 32, 48) and seconds > 0
    assert (found - expected.clamp(-1, 1)).abs().max().item() < 1e-3


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_the_scheduler_has_the_noise_levels_of_the_miniature(steps):
    scheduler = diffusers_demo.euler_scheduler(steps, 12.0, "cpu")
    assert torch.allclose(scheduler.sigmas, noise_schedule(steps, 12.0), atol=1e-6)
    assert torch.allclose(scheduler.timesteps, 1000 * noise_schedule(steps, 12.0)[:-1], atol=1e-3)


def test_random_weights_are_the_same_every_time_and_made_once(checkpoint, tmp_path):
    again = find_or_make(tmp_path, trained=tmp_path / "none")
    assert again.dit.read_bytes() == checkpoint.dit.read_bytes()
    written = again.vae.stat().st_mtime_ns
    assert find_or_make(tmp_path, trained=tmp_path / "none").vae.stat().st_mtime_ns == written
    assert not again.trained


def test_the_trained_miniature_is_preferred(checkpoint, tmp_path):
    found = find_or_make(tmp_path / "unused", trained=checkpoint.dit.parent)
    assert found.trained and found.dit == checkpoint.dit and found.router is None
    assert not (tmp_path / "unused").exists()


def test_command_without_comfyui_leaves_two_videos_and_a_table(tmp_path):
    from PIL import Image

    # neither a ComfyUI at home nor git on the path
    environment = {key: value for key, value in os.environ.items() if key not in ("COMFYUI_PATH", "PYTHONPATH")}
    environment |= {"HOME": str(tmp_path), "USERPROFILE": str(tmp_path), "PATH": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "demo.py"), "--here", "--tiny", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No ComfyUI (git is not installed); making the same two videos with diffusers." in done.stdout
    assert "not the speed-up" in done.stdout
    for name in ("dense", "sla2"):
        with Image.open(tmp_path / "out" / f"{name}.webp") as video:
            assert (video.size, video.n_frames) == ((128, 128), 9)
    with Image.open(tmp_path / "out" / "comparison.png") as sheet:
        assert sheet.size == (6 * (128 + 4), 2 * (128 + 4))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    dense, sla2 = results["runs"]
    assert results["host"] == "diffusers" and results["tokens"] == 192
    assert dense["sparse_calls"] is None
    # 2 steps of 3 layers (9 in the trained miniature); 3 key blocks, 1 kept
    assert sla2["sparse_calls"] in (6, 18) and sla2["dense_calls"] == 0
    assert sla2["sparsity"] == pytest.approx(2 / 3)
    assert 0 < results["latent_difference"] < 2
