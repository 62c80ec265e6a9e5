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
    rows = {row["name"]: row for row in content["rows"]}
    assert len(rows) == 7
    for row in rows.values():
        # 3 x 8 x 8 tokens are 3 key blocks, of which 1 is kept; dense steps count as 0, also those of a target out of reach
        assert (0.1 if row["target_error"] else 0.3) < row["skipped"] <= 0.67 and row["latent_error"] > 0.01
        assert 0 < row["psnr"] < 60 and 0 < row["ssim"] < 1
        assert row["cfg"] == (1 if row["steps"] == "4-8" else GUIDANCE)
        assert f"| {row['name']} | 4 | {'trained' if row['trained'] else 'none'} |" in preset_quality.markdown(content)
    assert rows["quality"]["skipped"] <= rows["fast"]["skipped"]
