"""One real ComfyUI server, and one Chromium with its page, for all tests of this folder."""

import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "comfyui"))

from tiny_wan import save_router, save_wan

from tooling.plan import PACK_FOLDER, ROOT
from tooling.server import Server

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def server(comfyui_path, tmp_path_factory):
    base = tmp_path_factory.mktemp("web")
    for folder in ("models/diffusion_models", "models/sla2", "custom_nodes", "input", "output", "user/default"):
        (base / folder).mkdir(parents=True)
    helpers = Path(__file__).parents[1] / "comfyui" / "helper_nodes"
    (base / "custom_nodes" / PACK_FOLDER).symlink_to(ROOT, target_is_directory=True)
    (base / "custom_nodes" / "sla2_test_helpers").symlink_to(helpers, target_is_directory=True)
    # on a first visit a dialog would cover the graph
    (base / "user/default/comfy.settings.json").write_text(json.dumps({"Comfy.TutorialCompleted": True}))
    save_wan(base / "models/diffusion_models/tiny_wan.safetensors")
    save_router(base / "models/sla2/good.safetensors")
    with Server(comfyui_path, base, wait_s=120, OMP_NUM_THREADS="1") as running:
        yield running


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Folder of the screenshots; kept like all of pytest's temporary folders."""
    folder = tmp_path_factory.mktemp("pictures")
    print(f"\nscreenshots: {folder}")
    return folder


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    chromium = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if chromium is None:
        pytest.skip("no Chromium found")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=chromium, headless=True, args=["--no-sandbox"])
        yield running
        running.close()
