"""A ComfyUI server that holds this pack and nothing else."""

import contextlib
import json
import sys
import tempfile
from pathlib import Path

from .comfyui import find_comfyui
from .paths import PACK_FOLDER, ROOT
from .server import Server

# on a first visit a dialog would cover the page
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Workflow.ShowMissingModelsWarning": False,
    "Comfy.Graph.CanvasInfo": False,
}


@contextlib.contextmanager
def pack_server():
    """A running Server on the CPU, with folders of its own that are gone afterwards. Exits where no ComfyUI is found."""
    comfyui, looked = find_comfyui()
    if comfyui is None:
        sys.exit(f"No ComfyUI found at {looked}.")
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        for name in ("models", "custom_nodes", "input", "output", "user/default"):
            (base / name).mkdir(parents=True)
        (base / "user/default/comfy.settings.json").write_text(json.dumps(SETTINGS), encoding="utf-8")
        (base / "custom_nodes" / PACK_FOLDER).symlink_to(ROOT, target_is_directory=True)
        with Server(comfyui, base) as server:
            yield server
