"""The real ComfyUI server of these tests, and what its history says."""

import os

from tooling.paths import PACK_FOLDER
from tooling.paths import ROOT as PACK
from tooling.server import Server

__all__ = ["PACK", "PACK_FOLDER", "ComfyServer", "error_of"]


class ComfyServer(Server):
    """Starts on construction, on the CPU. ``base`` holds models/, custom_nodes/, output/.

    The page is the one that this ComfyUI pins, or that of the folder in COMFYUI_FRONTEND: of an unpacked
    comfyui-frontend-package the folder comfyui_frontend_package/static.
    """

    def __init__(self, comfyui_path, base):
        # threads that wait for a busy core cost far more than they bring
        super().__init__(comfyui_path, base, "cpu", OMP_NUM_THREADS="1")
        if frontend := os.environ.get("COMFYUI_FRONTEND"):
            self.command += ["--front-end-root", frontend]
        self.start()


def error_of(entry):
    """(node id, message) of a failed prompt, or None."""
    for kind, details in entry["status"]["messages"]:
        if kind == "execution_error":
            return details["node_id"], details["exception_message"]
    return None
