"""What the Registry's archive holds: the files under git that .comfyignore does not leave out."""

import subprocess

from .paths import ROOT


def packed_files():
    """Their names, relative to the root and with "/"; in an unpacked archive, which is not under git, all files."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    names = listed.stdout.decode().split("\0") if listed.returncode == 0 else []
    names = [name for name in names if name] or [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*")]
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    left_out = [line for line in lines if line and not line.startswith("#")]
    return [name for name in names if (ROOT / name).is_file() and not _matches(name, left_out)]


def _matches(name, left_out):
    inside = any(line.endswith("/") and name.startswith(line) for line in left_out)
    return inside or name in left_out or "__pycache__" in name
