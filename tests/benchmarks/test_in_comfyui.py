"""The script that runs the miniature in ComfyUI: the presets at a few tokens."""

import json

import pytest

from benchmarks import preset_quality
from miniature.sample import GUIDANCE
from miniature.weight_files import weight_file


@pytest.mark.skipif(
    not weight_file("wan_miniature_dit.safetensors").exists(), reason="the weights are not in miniature/weights"
)
def test_every_preset_is_measured_against_dense(comfyui_path, comfy_scripts, tmp_path):
    out = tmp_path / "presets.json"
    options = ["--comfyui", comfyui_path, "--tiny", "--prompts", "1", "--device", "cpu", "--out", out]
    done = comfy_scripts.run("-m", "benchmarks.preset_quality", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    content = json.loads(out.read_text(encoding="utf-8"))
    rows = {(row["name"], row["steps"], row["trained"]): row for row in content["rows"]}
    # seven presets, one of them in 20 and in 8 steps, automatic with a router and without, one sparsity of few-step runs
    assert len(rows) == len(content["rows"]) == 8 + 4 + 1
    assert set(content["dense"]) == {"20", "8"}
    table = preset_quality.markdown(content)
    for (name, steps, trained), row in rows.items():
        # 3 x 8 x 8 tokens are 3 key blocks, of which 1 is kept; dense steps count as 0, also those of a target out of reach
        assert (0.1 if row["target_error"] else 0.3) < row["skipped"] <= 0.67 and row["latent_error"] > 0.01
        assert 0 < row["psnr"] < 60 and 0 < row["ssim"] < 1 and row["passed"] in (0, 1)
        assert row["cfg"] == (GUIDANCE if steps == 20 else 1)
        assert f"| {steps} | {name} | {'trained' if trained else 'none'} |" in table
    assert rows["quality", 20, False]["skipped"] <= rows["fast", 20, True]["skipped"]
