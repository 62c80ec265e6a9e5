"""Two videos of one miniature model, dense and with SLA2 attention: python demo.py

Makes an environment of its own, finds ComfyUI (COMFYUI_PATH, else where this pack is installed, else ~/ComfyUI, else the
official release by git), starts it, runs the bundled workflow, and prints a small table. Without ComfyUI it makes the
same two videos with diffusers. Everything it writes is in demo_output/.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from tooling.comfyui import clone_comfyui, find_comfyui, install_comfyui
from tooling.environment import Environment, SetupError, say
from tooling.paths import DEFAULT_OUTPUT, ROOT

PACKAGES = ["numpy", "safetensors"]
DIFFUSERS = ["diffusers>=0.35", "Pillow"]


def choose_comfyui(folder):
    """(path or None, one sentence why not)."""
    found, looked = find_comfyui()
    if found is not None:
        return found, None
    if os.environ.get("COMFYUI_PATH"):
        raise SetupError(f"COMFYUI_PATH names {looked}, and there is no main.py in it.")
    why_not = clone_comfyui(folder / "ComfyUI")
    return (folder / "ComfyUI", None) if why_not is None else (None, why_not)


def prepare(environment, folder, use_comfyui):
    """Installs what the demo needs. The ComfyUI to use, or None for diffusers."""
    environment.create()
    environment.install_torch()
    environment.install("the demo's packages", PACKAGES)
    comfyui, why_not = choose_comfyui(folder) if use_comfyui else (None, "--diffusers was asked for")
    if comfyui is None:
        say(f"No ComfyUI ({why_not}); making the same two videos with diffusers.")
        environment.install("diffusers", DIFFUSERS)
    else:
        install_comfyui(environment, comfyui)
    return comfyui


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder for everything (demo_output)")
    parser.add_argument("--here", action="store_true", help="use the current interpreter, install nothing")
    parser.add_argument("--diffusers", action="store_true", help="do not look for ComfyUI")
    parser.add_argument("--steps", type=int, help="sampling steps")
    parser.add_argument("--tiny", action="store_true", help="smallest videos: a trial of the command itself")
    options = parser.parse_args()
    folder = options.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    environment = Environment(None if options.here else folder / "environment")
    try:
        comfyui = prepare(environment, folder, not options.diffusers)
    except SetupError as error:
        say(f"The demo could not be set up: {error}")
        return 2
    command = [environment.python, "-m", "tooling.demo_inside", str(folder)]
    command += ["--comfyui", str(comfyui)] if comfyui else []
    command += ["--steps", str(options.steps)] if options.steps else []
    command += ["--tiny"] if options.tiny else []
    return subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
