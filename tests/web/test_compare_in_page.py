"""SLA2 Compare in the page: its numbers, and the button that sets minimum_tokens."""

import pytest

pytestmark = pytest.mark.web


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
    assert canvas.page.locator(".sla2 tr").count() == len(data["rows"]) == 7
    # as on a card where the search found one
    found = {"text": [""], "sla2_comparison": [data | {"break_even": 6144}]}
    canvas.js(f"{canvas.node('SLA2Compare')}.onExecuted(a)", found)
    canvas.page.wait_for_timeout(200)
    canvas.picture(f"comparison_{'vue' if vue else 'classic'}", "SLA2Compare")
    button = canvas.page.get_by_role("button", name="Set minimum_tokens to 6144")
    button.focus()
    canvas.page.keyboard.press("Enter")
    assert canvas.value("SLA2ApplyAttention", "minimum_tokens") == 6144
    assert "is 6144 now" in canvas.panel("SLA2Compare")
    canvas.js("app.extensionManager.workflow.activeWorkflow.changeTracker.undo()")
    canvas.page.wait_for_timeout(300)
    assert canvas.value("SLA2ApplyAttention", "minimum_tokens") == 0
    assert canvas.errors == []
