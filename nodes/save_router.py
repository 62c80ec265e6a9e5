"""SLA2 Save Router: a router into models/sla2, under a new name every time."""

import os
import re

import folder_paths
from comfy_api.latest import io

from ..sla2_kernels.weights import RouterFileError
from .compat.schema import search_aliases
from .load_router import FOLDER, Router
from .page.text import plain, show_on_node
from .training.saved_files import SavedFiles

saved_files = SavedFiles()


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
    def fingerprint_inputs(cls, filename_prefix, router=None):
        """New where a file is gone: "saved as ..." must not come from the cache then."""
        return saved_files.losses(filename_prefix)

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
    try:
        os.makedirs(directory, exist_ok=True)
        path = save_numbered(directory, stem, lambda path: router.save(path, overwrite=False))
    except OSError as error:
        raise RouterFileError(f"Router file {target} cannot be written: {error.strerror or error}.") from error
    saved_files.add(prefix, path)
    return os.path.relpath(path, folder)


def save_numbered(directory, stem, save):
    """save(path) with the next free number; the path. ``save`` raises FileExistsError where somebody else has taken it."""
    number = next_number(directory, stem)
    while True:
        path = os.path.join(directory, f"{stem}_{number:05}_.safetensors")
        try:
            save(path)
        except FileExistsError:
            number += 1
            continue
        return path


def checked_prefix(prefix, folder):
    """Absolute path of a prefix below ``folder``. Raises ValueError where it leads elsewhere, or is no file name."""
    parts = prefix.replace("\\", "/").split("/")
    names = all(map(is_file_name, parts))
    target = os.path.join(folder, *parts) if names else folder
    inside = os.path.realpath(folder)
    if not names or not is_inside(os.path.realpath(os.path.dirname(target)), inside):
        raise ValueError(f"SLA2 Save Router: filename_prefix must be a name inside models/{FOLDER}, got {prefix!r}.")
    return target


def is_inside(path, folder):
    # on Windows another drive has no common path at all
    return os.path.splitdrive(path)[0] == os.path.splitdrive(folder)[0] and os.path.commonpath([folder, path]) == folder


def is_file_name(part):
    """A name that every system takes: a folder of models is often shared by several."""
    if part in ("", ".", "..") or re.search(r'[<>:"|?*\x00-\x1f\ud800-\udfff]', part) or part[-1] in ". ":
        return False
    return not re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)", part.split(".")[0].strip(), re.IGNORECASE)


def next_number(directory, stem):
    """One more than the highest number in use, as ComfyUI counts its own files."""
    pattern = re.compile(re.escape(stem) + r"_(\d+)_\.safetensors", re.IGNORECASE)
    used = (pattern.fullmatch(name) for name in os.listdir(directory))
    return max((int(match[1]) for match in used if match), default=0) + 1
