"""The pack's file nodes without a ComfyUI: three of its modules stood in for, so that faults can be put below them."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

NODES = Path(__file__).resolve().parents[1] / "nodes" / "conftest.py"


def _fixtures_of(path):
    spec = importlib.util.spec_from_file_location("nodes_fixtures", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bench, qkv = (getattr(_fixtures_of(NODES), name) for name in ("bench", "qkv"))


@pytest.fixture
def in_a_small_disk():
    """in_a_small_disk(folder, options, command) runs a command that sees a file system of its own mounted on ``folder``."""

    def run(folder, options, command):
        unshare = shutil.which("unshare")
        script = f'mount -t tmpfs -o "{options}" tmpfs "$0" || exit 77; exec "$@"'
        if unshare is None:
            pytest.skip("this system has no unshare")
        done = subprocess.run(
            [unshare, "--map-root-user", "--mount", "sh", "-c", script, str(folder), *command],
            capture_output=True,
            text=True,
            timeout=120,
        )
        if done.returncode == 77 or "unshare" in done.stderr[:10]:
            pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")
        return done

    return run


class Anything:
    """Stands for classes and functions of ComfyUI's API that only a page would use."""

    def __getattr__(self, name):
        return Anything()

    def __call__(self, *args, **kwargs):
        return Anything()


@pytest.fixture
def file_nodes(pack_module, tmp_path, monkeypatch):
    """The module nodes.save_router, its models/sla2 below tmp_path."""
    folder = tmp_path / "models" / "sla2"
    folder.mkdir(parents=True)
    io = SimpleNamespace(
        ComfyNode=object,
        NodeOutput=SimpleNamespace,
        Custom=lambda name: Anything(),
        Schema=Anything(),
        Int=SimpleNamespace(Input=object),
    )
    latest = ModuleType("comfy_api.latest")
    latest.io = io
    paths = ModuleType("folder_paths")
    paths.get_folder_paths = lambda kind: [str(folder)]
    stand_ins = {"comfy_api": ModuleType("comfy_api"), "comfy_api.latest": latest, "folder_paths": paths}
    for name, module in stand_ins.items():
        monkeypatch.setitem(sys.modules, name, module)
    module = pack_module("nodes.save_router")
    others = ("load_router", "training.router_files")
    names = [module.__name__, *(module.__name__.replace("save_router", other) for other in others)]
    yield SimpleNamespace(module=module, folder=folder)
    for name in names:
        sys.modules.pop(name, None)
