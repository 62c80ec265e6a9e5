"""SLA2 Save Router: a router into models/sla2, under a new name every time."""

import os
import re

import folder_paths
from comfy_api.latest import io

from .load_router import FOLDER, Router
from .progress_text import plain, show_on_node
from .schema_support import search_aliases


class SLA2SaveRouter(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SLA2SaveRouter",
            display_name="SLA2 Save Router",
            category="model/sla2",
            description="Saves a trained router as safetensors in models/sla2, where SLA2 Load Router finds it "
            "(refresh the page's node definitions with R). Files are never overwritten: a number is appended.",
            is_output_node=True,
            **search_aliases("save sparse attention weights", "SLA2 weights"),
            hidden=[io.Hidden.unique_id],
            inputs=[
                Router.Input("router", tooltip="From SLA2 Train Router."),
                io.String.Input(
                    "filename_prefix", default="router",
                    tooltip='File name in models/sla2; may begin with a folder, such as "wan/router".',
                ),
            ],
            outputs=[],
        )  # fmt: skip

    @classmethod
    def execute(cls, router, filename_prefix) -> io.NodeOutput:
        if router is None:
            raise ValueError("SLA2 Save Router: this is the untrained router, so there is nothing to save.")
        text = plain(f"saved as {save_router(router, filename_prefix)} in models/{FOLDER}")
        show_on_node(cls.hidden.unique_id, text)
        return io.NodeOutput(ui={"text": (text,)})


def save_router(router, prefix):
    """Saves under ``prefix`` and the next free number; the file's name relative to models/sla2. Raises ValueError, RouterFileError."""
    folder = folder_paths.get_folder_paths(FOLDER)[0]
    target = checked_prefix(prefix, folder)
    directory, stem = os.path.split(target)
    os.makedirs(directory, exist_ok=True)
    path = os.path.join(directory, f"{stem}_{next_number(directory, stem):05}_.safetensors")
    router.save(path)
    return os.path.relpath(path, folder)


def checked_prefix(prefix, folder):
    """Absolute path of a prefix below ``folder``. Raises ValueError where it leads elsewhere, or is no file name."""
    parts = prefix.replace("\\", "/").split("/")
    names = all(part not in ("", ".", "..") and not re.search(r'[<>:"|?*\x00-\x1f]', part) for part in parts)
    target = os.path.join(folder, *parts) if names else folder
    inside = os.path.realpath(folder)
    if not names or os.path.commonpath([inside, os.path.realpath(os.path.dirname(target))]) != inside:
        raise ValueError(f"SLA2 Save Router: filename_prefix must be a name inside models/{FOLDER}, got {prefix!r}.")
    return target


def next_number(directory, stem):
    """One more than the highest number in use, as ComfyUI counts its own files."""
    pattern = re.compile(re.escape(stem) + r"_(\d+)_\.safetensors", re.IGNORECASE)
    used = (pattern.fullmatch(name) for name in os.listdir(directory))
    return max((int(match[1]) for match in used if match), default=0) + 1
