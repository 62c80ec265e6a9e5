"""Settings that no model can have are refused when the prompt is queued, before anything is loaded, in one sentence."""

import json
import re

import pytest

from tooling.server import PromptFailed

BAD = [
    ({"dense_layers": "0, first"}, "'first' is no layer or range of layers."),
    ({"dense_layers": "3-1"}, "ends before it starts"),
    ({"schedule": "0%-20% dense"}, "has no colon"),
    ({"schedule": "layers 0-x: dense"}, "is no layer or range of layers"),
    ({"schedule": "0%-20%: 1.5"}, "a sparsity of at least 0 and below 1"),
    ({"start_percent": 0.8, "end_percent": 0.2}, "start_percent must be below end_percent"),
    ({"preset": "fastest"}, "preset must be one of automatic, custom, quality"),
    ({"method": "best"}, "method must be one of automatic, sla2, top-k only"),
    ({"preset": "automatic", "method": "top-k only"}, "needs the sparsity that its LoRA was distilled with"),
    ({"preset": "constant quality", "method": "top-k only"}, "needs calls that measure their error"),
    ({"preset": "constant quality", "ratio_mode": "fixed"}, "needs calls that measure their error"),
    (
        {"target_error": 0.1, "ratio_mode": "estimated", "method": "sla2"},
        "target_error needs calls that measure their error",
    ),
    ({"target_error": 1.5, "method": "sla2"}, "target_error must be at least 0 (off) and below 1, got 1.5"),
    ({"ratio_mode": "guessed"}, "ratio_mode must be one of learned, estimated, fixed, fitted"),
]


def refusal(comfy, prompt):
    with pytest.raises(PromptFailed) as refused:
        comfy.server.queue(prompt)
    return str(refused.value)


@pytest.mark.parametrize(("settings", "sentence"), BAD, ids=[json.dumps(settings) for settings, _ in BAD])
def test_settings_of_no_model_are_refused_once(comfy, prompt, settings, sentence):
    node = prompt.apply(prompt.model(), **settings)
    prompt.save(prompt.sample(node))
    ((named, said),) = re.findall(r'"(\d+)": {"errors": \[{.*?"details": "(.+?)", "extra_info"', refusal(comfy, prompt))
    assert named == node[0] and sentence in said


def test_a_schedule_behind_a_preset_is_not_read(comfy, prompt):
    patched = prompt.apply(prompt.model(), schedule="nothing that can be read", preset="balanced")
    prompt.save(prompt.sample(patched))
    assert comfy.server.run(prompt)["status"]["status_str"] == "success"
