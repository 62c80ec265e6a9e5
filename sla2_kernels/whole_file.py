"""Atomic file writes: a file appears under its name only when it is complete, even if the process is killed half way."""

import os
import secrets
import stat

RENAMING_KEEPS = os.name == "nt"  # os.rename refuses a name that is taken


def write_whole(path, write, *, overwrite=True):
    """``write(draft)`` fills an empty file of another name in the same folder; then it gets the name ``path``.

    Raises OSError; FileExistsError where ``overwrite`` is False and the file exists, which then stays.
    """
    # a symbolic link stays a link: the file it points to is replaced
    path = os.path.realpath(path) if overwrite else os.fspath(path)
    draft = os.path.join(os.path.dirname(path), f"sla2-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        open(draft, "xb").close()
        mode = os.stat(draft).st_mode
        write(draft)
        if os.stat(draft).st_mode != mode:
            # safetensors 0.8 replaces the draft by a file that its owner alone may read
            os.chmod(draft, stat.S_IMODE(mode))
        with open(draft, "rb+") as file:
            os.fsync(file.fileno())
        (os.replace if overwrite else _take_name)(draft, path)
    finally:
        if os.path.exists(draft):
            os.remove(draft)


def _take_name(draft, path):
    if RENAMING_KEEPS:
        os.rename(draft, path)
        return
    try:
        os.link(draft, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links, such as FAT
        _rename_claimed(draft, path)


def _rename_claimed(draft, path):
    """Reserves the name by a claim file while renaming. A claim left by a killed process blocks that name for good."""
    claim = f"{path}.claim"
    open(claim, "xb").close()
    try:
        if os.path.lexists(path):
            raise FileExistsError(f"{path} exists.")
        os.rename(draft, path)
    finally:
        os.remove(claim)
