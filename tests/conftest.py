"""Finding ComfyUI, loading the pack the way ComfyUI does, and saying loudly when the ComfyUI tests did not run."""

import importlib
import importlib.util
import os
import sys
from pathlib import Path

import pytest

PACK = Path(__file__).resolve().parents[1]
PACK_NAME = "sla2_pack"


def find_comfyui():
    """(path or None, where it was looked for): COMFYUI_PATH, else two levels up in custom_nodes, else ~/ComfyUI."""
    given = os.environ.get("COMFYUI_PATH")
    if given:
        candidate = Path(given).expanduser()
    elif PACK.parent.name == "custom_nodes":
        candidate = PACK.parents[1]
    else:
        candidate = Path.home() / "ComfyUI"
    return (candidate if (candidate / "main.py").is_file() else None), candidate


def load_pack():
    """The pack as a package of its own name: its folder nodes/ must not be importable as ComfyUI's module nodes."""
    if PACK_NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            PACK_NAME, PACK / "__init__.py", submodule_search_locations=[str(PACK)]
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules[PACK_NAME] = module
        spec.loader.exec_module(module)
    return sys.modules[PACK_NAME]


@pytest.fixture(scope="session")
def pack_module():
    """pack_module("nodes.settings") is that module of the pack."""
    load_pack()
    return lambda name: importlib.import_module(f"{PACK_NAME}.{name}")


@pytest.fixture(scope="session")
def comfyui_path():
    path, looked = find_comfyui()
    if path is None:
        pytest.skip(f"no ComfyUI found at {looked}")
    return path


def pytest_collection_modifyitems(items):
    for item in items:
        if (PACK / "tests" / "comfyui") in item.path.parents:
            item.add_marker("comfyui")


def pytest_configure(config):
    config.addinivalue_line("markers", "comfyui: runs in a real ComfyUI server")


def pytest_terminal_summary(terminalreporter):
    def count(*outcomes):
        reports = [report for outcome in outcomes for report in terminalreporter.stats.get(outcome, [])]
        return sum(1 for report in reports if "comfyui" in getattr(report, "keywords", {}))

    ran, skipped = count("passed", "failed", "error"), count("skipped")
    path, looked = find_comfyui()
    if ran:
        terminalreporter.write_line(
            f"ComfyUI tests: {ran} ran (ComfyUI at {path})" + f", {skipped} skipped" * bool(skipped)
        )
    elif path is None:
        terminalreporter.write_line(
            f"ComfyUI tests: {skipped} NOT RUN: no ComfyUI found at {looked}", red=True, bold=True
        )
