"""Router files in models/sla2: a new name for every one that is saved."""

import logging
import os
import re

import folder_paths

from ...sla2_kernels.weights import RouterFileError
from .saved_files import SavedFiles

logger = logging.getLogger("sla2")

FOLDER = "sla2"
MAX_BYTES = 200  # of the 255 that file systems take, which a number and an ending follow

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


def save_trained(router, stem, steps):
    """Saves what ``steps`` of a training that ended made, as <stem>_<number>_; (sentence that says where, advice) for the user.

    router: function that makes the RouterWeights. Where it cannot be made or saved the sentence says why: the error that
    ended the training comes first.
    """
    try:
        name = save_router(router(), stem)
    except (ValueError, TypeError, RuntimeError) as error:
        if not isinstance(error, ValueError):
            logger.exception("SLA2 Train Router: the router could not be made or saved")
        return f"What {steps} optimisation steps trained is lost: {str(error).rstrip('.')}.", ""
    saved = f"What {steps} optimisation steps trained is saved as {name} in models/{FOLDER}."
    return saved, "Load it and connect it to resume to go on."


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
    longest = max(len(part.encode()) for part in parts) if names else 0
    if longest > MAX_BYTES:
        raise ValueError(
            f"SLA2 Save Router: filename_prefix holds a name of {longest} bytes: at most {MAX_BYTES} are allowed."
        )
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
