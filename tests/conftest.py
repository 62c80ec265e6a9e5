"""Finding ComfyUI, loading the pack the way ComfyUI does, and saying loudly when the ComfyUI tests did not run."""

import importlib
import importlib.util
import sys

import pytest

from sla2_kernels.support import interpreting
from tooling.comfyui import find_comfyui
from tooling.paths import ROOT as PACK

sys.path.append(str(PACK / "tests" / "comfyui"))

from comfy_fixtures import comfy, comfy_scripts, new_prompt, prompt  # noqa: F401  fixtures: one server for every folder's tests

PACK_NAME = "sla2_pack"


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
    """pack_module("nodes.settings.values") is that module of the pack."""
    load_pack()
    return lambda name: importlib.import_module(f"{PACK_NAME}.{name}")


@pytest.fixture(scope="session")
def comfyui_path():
    path, looked = find_comfyui()
    if path is None:
        pytest.skip(f"no ComfyUI found at {looked}")
    return path


def pytest_configure(config):
    if interpreting() and importlib.util.find_spec("triton") is not None:
        from language_patches import leave_out_overflow, patch_language_once

        patch_language_once()
        leave_out_overflow()


COMFYUI_TESTS = pytest.StashKey[set]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Marks which tests need a real ComfyUI, by fixture or by mark, before -m chooses: run_tests.py runs and counts them."""
    needing = [item for item in items if "comfyui_path" in item.fixturenames or item.get_closest_marker("comfyui")]
    config.stash[COMFYUI_TESTS] = {item.nodeid for item in needing}
    for item in needing:
        item.add_marker("comfyui")
        item.user_properties.append(("comfyui", "needed"))  # what the JUnit report says


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    """One closing line: how many ComfyUI tests ran, or why none did."""
    reporter, needing = config.pluginmanager.get_plugin("terminalreporter"), config.stash.get(COMFYUI_TESTS, set())
    if reporter is None or not needing or config.option.collectonly:
        return

    def count(*outcomes):
        reports = {report.nodeid for outcome in outcomes for report in reporter.stats.get(outcome, [])}
        return len(reports & needing)

    ran, skipped = count("passed", "failed", "error"), count("skipped")
    path, looked = find_comfyui()
    where = f"ComfyUI at {path}" if path else f"no ComfyUI found at {looked}"
    if ran:
        reporter.write_line(f"ComfyUI tests: {ran} ran ({where})" + f", {skipped} skipped" * bool(skipped))
    else:
        reporter.write_line(f"ComfyUI tests: {skipped} NOT RUN: {where}", red=True, bold=True)
