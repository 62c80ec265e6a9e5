"""The pack's file nodes without a ComfyUI: three of its modules stood in for, so that faults can be put below them."""

import sys
from types import ModuleType, SimpleNamespace

import pytest


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
        ComfyNode=object, NodeOutput=SimpleNamespace, Custom=lambda name: Anything(), Schema=Anything()
    )
    latest = ModuleType("comfy_api.latest")
    latest.io = io
    paths = ModuleType("folder_paths")
    paths.get_folder_paths = lambda kind: [str(folder)]
    stand_ins = {"comfy_api": ModuleType("comfy_api"), "comfy_api.latest": latest, "folder_paths": paths}
    for name, module in stand_ins.items():
        monkeypatch.setitem(sys.modules, name, module)
    module = pack_module("nodes.save_router")
    names = [module.__name__, module.__name__.replace("save_router", "load_router")]
    yield SimpleNamespace(module=module, folder=folder)
    for name in names:
        sys.modules.pop(name, None)
