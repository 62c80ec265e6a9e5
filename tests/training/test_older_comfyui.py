"""A node that needs a newer ComfyUI says so when the prompt is queued, before anything of it runs."""

import pytest
import test_comfyui_train
import test_train_lora

from tooling.server import PromptFailed


@pytest.fixture
def older(comfy, new_prompt):
    """The server's ComfyUI without what the nodes ask for."""

    def switch(older):
        prompt = new_prompt()
        prompt.add("SLA2TestOlderComfyUI", older=older)
        comfy.run(prompt)

    switch(True)
    yield
    switch(False)


@pytest.mark.parametrize(
    ("node", "train", "version"),
    [("SLA2 Train Router", test_comfyui_train.train, "0.14"), ("SLA2 Train LoRA", test_train_lora.train, "0.25")],
)
def test_the_prompt_is_refused_and_the_version_named(comfy, older, prompt, node, train, version):
    trained = train(prompt, prompt.model())
    prompt.add("SLA2SaveRouter", router=[trained[0], 0 if "Router" in node else 1], filename_prefix="older")
    with pytest.raises(
        PromptFailed, match=rf"{node} needs ComfyUI {version} or newer, .*; this is [\d.]+: update ComfyUI"
    ):
        comfy.server.queue(prompt)
