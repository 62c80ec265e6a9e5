"""Collects what comfyui_step.py and training_steps.py need of ComfyUI into one small folder, for a GPU machine without it.

    python -m benchmarks.collect_comfyui FOLDER [--comfyui PATH]

Copies the Python files of ComfyUI's comfy/ and of its training node (no models, no web page; about 6 MB) and the small packages
that they import and a PyTorch machine seldom has. Not copied: what PyTorch machines have (torch, numpy, einops, psutil, scipy,
safetensors, transformers, torchvision, Pillow, PyYAML, tqdm); comfy-kitchen, whose wheel must fit that machine; and PyAV, which
only training_steps.py imports, by way of ComfyUI's training node.
"""

import argparse
import importlib.util
import shutil
from pathlib import Path

from tooling.comfyui import find_comfyui

FILES = (
    *("node_helpers.py", "LICENSE", "comfyui_version.py", "folder_paths.py", "latent_preview.py", "protocol.py"),
    *("comfy_extras/nodes_train.py", "comfy_extras/nodes_custom_sampler.py"),
)
FOLDERS = ("comfy", "comfy_api", "comfy_execution")
PACKAGES = ("comfy_aimdo", "torchsde", "trampoline")


def copy_python_files(source, target):
    """Copies the .py files below ``source``; returns their total size in bytes."""
    total = 0
    for file in sorted(source.rglob("*.py")):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
        total += file.stat().st_size
    return total


def collect(comfyui, folder):
    """Fills ``folder``; returns its size in bytes. Raises FileNotFoundError with what is missing."""
    comfyui, folder = Path(comfyui), Path(folder)
    if not (comfyui / "comfy" / "model_base.py").is_file():
        raise FileNotFoundError(f"{comfyui} is no ComfyUI checkout: comfy/model_base.py is missing.")
    total = sum(copy_python_files(comfyui / name, folder / name) for name in FOLDERS)
    for name in FILES:
        if (comfyui / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(comfyui / name, folder / name)
            total += (comfyui / name).stat().st_size
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise FileNotFoundError(f"package {name} is not installed here: install ComfyUI's requirements first.")
        place = Path(spec.submodule_search_locations[0])
        total += copy_python_files(place, folder / name)
    return total


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--comfyui", default=find_comfyui()[1])
    args = parser.parse_args(argv)
    print(f"{args.folder}: {collect(args.comfyui, args.folder) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
