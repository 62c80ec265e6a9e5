"""Finding a ComfyUI checkout, or fetching the official release, and installing what it needs beside a torch that stays."""

import os
import re
from pathlib import Path

from .clone import clone
from .environment import SetupError, say
from .paths import ROOT

RELEASE = "v0.33.0"
REPOSITORY = "https://github.com/comfyanonymous/ComfyUI"


def find_comfyui():
    """(path or None, where it was looked for): COMFYUI_PATH, else two levels up in custom_nodes, else ~/ComfyUI."""
    given = os.environ.get("COMFYUI_PATH")
    if given:
        candidate = Path(given).expanduser().resolve()
    elif ROOT.parent.name == "custom_nodes":
        candidate = ROOT.parents[1]
    else:
        candidate = Path.home() / "ComfyUI"
    return (candidate if (candidate / "main.py").is_file() else None), candidate


def clone_comfyui(target):
    """Clones the official release to ``target``, unless it is there. None, or a part of a sentence: why not."""
    if (target / "main.py").is_file():
        return None
    say(f"No ComfyUI here; fetching {RELEASE} by git")
    return clone(REPOSITORY, RELEASE, target)


def install_comfyui(environment, comfyui):
    """ComfyUI's requirements into ``environment``, torch untouched; then torchvision and torchaudio that go with it."""
    lines = (comfyui / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    wanted = [line for line in wanted if not re.match(r"(torch|torchvision|torchaudio)\b(?!-)", line)]
    environment.install("ComfyUI's requirements", wanted)
    if environment.installs:
        _install_torch_companions(environment)


def install_manager(environment, comfyui):
    """The Manager that this ComfyUI names, where it names one: a test lets it install the pack."""
    wanted = comfyui / "manager_requirements.txt"
    if wanted.is_file():
        environment.install("ComfyUI's Manager", wanted.read_text(encoding="utf-8").split())


def _install_torch_companions(environment):
    version = environment.ask("import importlib.metadata as m; print(m.version('torch'))")
    minor = int(version.split(".")[1])
    for name, release in (("torchvision", f"0.{minor + 15}.*"), ("torchaudio", f"2.{min(minor, 11)}.*")):
        if environment.imports(name):
            continue
        # their own requirement would replace torch
        environment.install(name, [f"{name}=={release}"], "--no-deps")
        if not environment.imports(name):
            _repair(environment, name)
        if not environment.imports(name):
            raise SetupError(f"{name} for torch {version} is installed but cannot be imported, and ComfyUI needs it.")


def _repair(environment, name):
    """The packages' binary parts want CUDA's libraries beside a CPU torch; ComfyUI needs neither of these parts.

    torchvision registers two operators even where its binary part is absent: they are made as conditional as the rest.
    torchaudio has a mode without its binary part, taken when the file is not there.
    """
    say(f"  {name}: switching off its CUDA part, which the CPU build of torch cannot load")
    folder = environment.site_packages() / name
    if name == "torchvision":
        file = folder / "_meta_registrations.py"
        text = file.read_text(encoding="utf-8")
        pattern = r'^@torch\.library\.register_fake\("torchvision::(q?nms)"\)'
        file.write_text(re.sub(pattern, r'@register_meta("\1")', text, flags=re.MULTILINE), encoding="utf-8")
    else:
        for file in (folder / "lib").glob("*.so"):
            file.unlink()
