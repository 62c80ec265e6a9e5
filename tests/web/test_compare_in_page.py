"""SLA2 Compare in the page: its numbers, the slider between its frames, and the button that sets minimum_tokens."""

import pytest

from miniature.weight_files import weight_file
from tooling.checkpoint import VAE

pytestmark = pytest.mark.web
SIDE = 128  # of videos that are decoded


@pytest.fixture
def comparing_prompt(sampling_prompt):
    inputs = dict(sampling_prompt["6"]["inputs"], find_break_even=False, steps=3)
    inputs.pop("denoise")
    nodes = {name: sampling_prompt[name] for name in ("1", "2", "3", "4", "5")}
    return nodes | {"6": {"class_type": "SLA2Compare", "inputs": inputs}}


@pytest.mark.parametrize("vue", [False, True], ids=["classic", "vue"])
def test_the_numbers_are_shown_and_the_break_even_can_be_set_and_undone(canvas, comparing_prompt, vue):
    canvas.look(vue=vue)
    canvas.load_prompt(comparing_prompt)
    entry = canvas.queue()
    data = entry["outputs"]["6"]["sla2_comparison"][0]
    text = canvas.panel("SLA2Compare")
    assert data["headline"] in text and "6 of 9 calls accelerated" in text
    assert canvas.page.locator(".sla2 tr").count() == len(data["rows"]) == 8
    # as on a card where the search found one
    found = {"text": [""], "sla2_comparison": [data | {"break_even": 6144}]}
    canvas.js(f"{canvas.node('SLA2Compare')}.onExecuted(a)", found)
    canvas.rest()
    canvas.picture(f"comparison_{'vue' if vue else 'classic'}", "SLA2Compare")
    button = canvas.page.get_by_role("button", name="Set minimum_tokens to 6144")
    button.focus()
    canvas.page.keyboard.press("Enter")
    assert canvas.value("SLA2ApplyAttention", "minimum_tokens") == 6144
    assert "is now 6144" in canvas.panel("SLA2Compare")
    canvas.js("app.extensionManager.workflow.activeWorkflow.changeTracker.undo()")
    canvas.rest()
    assert canvas.value("SLA2ApplyAttention", "minimum_tokens") == 0
    assert canvas.errors == []


@pytest.mark.skipif(not weight_file(VAE).exists(), reason="the miniature's VAE is not in miniature/weights")
@pytest.mark.parametrize("vue", [False, True], ids=["classic", "vue"])
def test_a_slider_moves_between_the_dense_and_the_sla2_frames(canvas, comparing_prompt, vue):
    comparing_prompt["7"] = {"class_type": "VAELoader", "inputs": {"vae_name": VAE}}
    comparing_prompt["6"]["inputs"]["vae"] = ["7", 0]
    comparing_prompt["5"]["inputs"].update(width=SIDE, height=SIDE)
    canvas.look(vue=vue)
    canvas.load_prompt(comparing_prompt)
    frames = canvas.queue()["outputs"]["6"]["sla2_frames"][0]
    assert len(set(frames["numbers"])) == 8 and frames["numbers"][0] == 1 and frames["numbers"][-1] == 9
    assert len(frames["dense"]) == len(frames["sla2"]) == 8
    page = canvas.page
    canvas.js(f"(app.canvas.ds.scale = 0.8, app.canvas.centerOnNode({canvas.node('SLA2Compare')}))")
    canvas.until(
        "((all) => all.length === 2 && all.every((i) => i.complete))([...document.querySelectorAll('.sla2-frames img')])"
    )
    canvas.rest()
    images = page.locator(".sla2-frames img")
    sizes = images.evaluate_all("(all) => all.map((i) => [i.naturalWidth, i.naturalHeight, i.clientHeight > 0])")
    assert sizes == [[SIDE, SIDE, True]] * 2
    assert [image.get_attribute("alt") for image in images.all()] == ["dense", "SLA2"]
    slider = page.get_by_role("slider", name="dense to the left, SLA2 to the right")
    box = slider.bounding_box()
    for n, share in enumerate((0.5, 0.2)):
        page.mouse.move(box["x"] + share * box["width"], box["y"] + box["height"] / 2, steps=4)
        page.mouse.down() if n == 0 else page.mouse.up()
    dragged = int(slider.input_value())
    assert 15 <= dragged <= 25 and clipped(images) == f"inset(0px 0px 0px {dragged}%)"
    page.keyboard.press("ArrowRight")
    assert clipped(images) == f"inset(0px 0px 0px {dragged + 1}%)"
    before = images.nth(0).get_attribute("src")
    page.get_by_role("slider", name="frame", exact=True).press("End")
    assert images.nth(0).get_attribute("src") != before and "frame 9 of 9" in canvas.panel("SLA2Compare")
    canvas.picture(f"slider_{'vue' if vue else 'classic'}")
    assert canvas.errors == []


def clipped(images):
    return images.nth(1).evaluate("(i) => getComputedStyle(i).clipPath")


def test_a_vae_of_another_model_is_refused_before_anything_is_sampled(comfy, comparing_prompt):
    comparing_prompt["7"] = {"class_type": "VAELoader", "inputs": {"vae_name": "pixel_space"}}
    comparing_prompt["6"]["inputs"]["vae"] = ["7", 0]
    node, message = comfy.error(comparing_prompt)
    assert node == "6" and "decodes 3 latent channels and this model makes 16" in message
