"""Router files in models/sla2: a new name for every one that is saved."""

import os
import re

import folder_paths

from ...sla2_kernels.weights import RouterFileError
from .saved_files import SavedFiles

FOLDER = "sla2"

saved_files = SavedFiles()


def router_folder():
    """Where new router files go."""
    return folder_paths.get_folder_paths(FOLDER)[0]


def save_router(router, prefix):
    """Saves under ``prefix`` and the next free number; the file's name relative to models/sla2. Raises ValueError, RouterFileError."""
    folder = router_folder()
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
    """save(path) with the next free number; the path. ``save`` raises FileExistsError if the name is taken."""
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
