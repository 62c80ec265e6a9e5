"""The miniature against real ComfyUI: same keys, same numbers, same loaders, same sampling."""

import json
from pathlib import Path

import pytest

from tooling.paths import ROOT


@pytest.fixture(scope="module")
def probe(comfyui_path, comfy_scripts, tiny_weights):
    script = Path(__file__).with_name("comfy_probe.py")
    done = comfy_scripts.run(script, comfyui_path, ROOT, tiny_weights, cwd=tiny_weights)
    assert done.returncode == 0, done.stderr[-4000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("PROBE "))
    return json.loads(line.removeprefix("PROBE "))


def test_latent_constants_are_comfyui_s(probe):
    assert probe["constants"] == {"mean": 0.0, "std": 0.0}


def test_vae_keys_are_equal(probe):
    assert probe["vae_keys_equal"]


@pytest.mark.parametrize("frames", [1, 5, 17])
@pytest.mark.parametrize("way", ["encode", "decode"])
def test_whole_video_vae_equals_comfyui_s_chunked_one(probe, way, frames):
    assert probe[f"{way}_{frames}"] < 1e-4


def test_transformer_equals_comfyui_s(probe):
    assert probe["velocity"] < 1e-4


def test_scaled_rope_is_that_of_scale_rope(probe):
    assert probe["velocity_scaled"] < 1e-4
    assert probe["scale_matters"] > 0.01


def test_stock_loaders_detect_wan21_text_to_video(probe):
    assert probe["detected"] == "WAN21_T2V"
    sizes = {"dim": 256, "ffn_dim": 768, "num_layers": 2, "num_heads": 2, "model_type": "t2v"}
    assert probe["detected_sizes"] == sizes
    assert (probe["model_type"], probe["default_shift"]) == ("FLOW", 8.0)


def test_loaded_files_encode_decode_and_sample_alike(probe):
    assert probe["file_encode"] < 1e-3
    assert probe["file_decode"] < 1e-3
    assert probe["sampled"] < 2e-3


def test_the_stock_loader_takes_the_lora_of_a_few_steps(probe):
    assert probe["lora_layers"] == 2 * 10
    assert probe["lora_sampled"] < 0.02 * probe["lora_matters"]
