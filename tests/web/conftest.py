"""One Chromium with the page of the tests' ComfyUI server, for all tests of this folder."""

import subprocess
import sys

import pytest
from canvas import Canvas

from tooling.browser import find_chromium, open_chromium
from tooling.paths import ROOT


@pytest.fixture(scope="session")
def server(comfy):
    return comfy.server


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Folder of the screenshots; kept like all of pytest's temporary folders."""
    folder = tmp_path_factory.mktemp("pictures")
    print(f"\nscreenshots: {folder}")
    return folder


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium found")
    with playwright.sync_playwright() as driver:
        running = open_chromium(driver, chromium)
        yield running
        running.close()


@pytest.fixture(scope="session")
def canvas(server, browser, pictures):
    """The page, opened once."""
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    yield Canvas(context.new_page(), server.url, pictures)
    context.close()


@pytest.fixture
def small_window(canvas):
    """For what looks at no picture: drawing is half of the time that a large workflow takes to load."""
    whole = canvas.page.viewport_size
    canvas.page.set_viewport_size({"width": 300, "height": 200})
    yield
    canvas.page.set_viewport_size(whole)


@pytest.fixture(scope="session")
def tiny_files(comfy, comfyui_path):
    """Tiny files under the names of what people run, in the server's folders."""
    comfy.skip_before(0, 32, "a checkpoint in int8_convrot")
    script = ROOT / "tests/comfyui/template_files.py"
    command = [sys.executable, str(script), str(comfyui_path), str(comfy.base / "models")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


SAMPLER = {"seed": 5, "steps": 3, "cfg": 6.0, "sampler_name": "uni_pc", "scheduler": "simple"}


@pytest.fixture
def sampling_prompt():
    """API prompt: tiny Wan through SLA2 Apply Attention, sampled, reported. 768 tokens, 3 steps, 3 layers."""
    apply = {
        "model": ["1", 0], "sparsity": 0.75, "bit_width": "16bit", "ratio_mode": "learned", "fixed_ratio": 0.8,
        "start_percent": 0.0, "end_percent": 1.0, "dense_layers": "1", "minimum_tokens": 0,
        "on_unsupported": "run dense and say so", "preset": "custom",
    }  # fmt: skip
    conditioning = {"number": 1, "image": False, "label": ""}
    return {
        "1": node("UNETLoader", unet_name="tiny_wan.safetensors", weight_dtype="default"),
        "2": node("SLA2ApplyAttention", **apply),
        "3": node("SLA2TestConditioning", **conditioning),
        "4": node("SLA2TestConditioning", **conditioning | {"number": 2}),
        "5": node("EmptyHunyuanLatentVideo", width=256, height=256, length=9, batch_size=1),
        "6": node("KSampler", model=["2", 0], positive=["3", 0], negative=["4", 0], latent_image=["5", 0],
                  denoise=1.0, **SAMPLER),
        "7": node("SLA2Report", model=["2", 0], samples=["6", 0]),
    }  # fmt: skip


def node(class_type, /, **inputs):
    return {"class_type": class_type, "inputs": inputs}
