"""comfy-import-guard on what is shipped: every name of comfy.* that the pack uses exists in this ComfyUI, every call fits."""

import json
import subprocess
import sys

import pytest

from tooling.archive import packed_files
from tooling.paths import PACK_FOLDER, ROOT


def test_every_name_of_comfyui_that_is_used_exists_and_every_call_fits(comfyui_path, tmp_path):
    pytest.importorskip("comfy_import_guard")
    if not (comfyui_path / ".git").exists():
        pytest.skip("comfy-import-guard reads ComfyUI from git, and this one is no clone")
    pack = tmp_path / "custom_nodes" / PACK_FOLDER
    for name in (name for name in packed_files() if name.endswith(".py")):
        (pack / name).parent.mkdir(parents=True, exist_ok=True)
        (pack / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "ComfyUI").symlink_to(comfyui_path, target_is_directory=True)
    command = [
        sys.executable, "-m", "comfy_import_guard.cli", "check", "--json", "--offline", "--target", "HEAD",
        "--comfy-dir", str(pack.parent), "--cache-dir", str(tmp_path),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    (found,) = json.loads(done.stdout)["packs"]
    assert found["references"] > 40 and not found["unparseable"]
    missing = [f"{row['file']}:{row['line']} {row['dotted']} {row['detail']}" for row in found["breaking"]]
    assert missing == [] and found["verdict"] == "SAFE"
