"""What an ended training saves: LoRA and router, each where the other cannot be; a router alone."""

import sys

import pytest
import torch

LORA = {"diffusion_model.blocks.0.self_attn.q.lora_up.weight": torch.ones(2, 2)}
ERRORS = [TypeError("a layer without ratios"), RuntimeError("CUDA error: device lost"), ValueError("no such sparsity")]


@pytest.fixture
def save_both(file_nodes, pack_module):
    module = pack_module("nodes.training.lora_files")
    yield module.save_both
    # it holds the stand-ins
    sys.modules.pop(module.__name__)


def failing(error):
    def make():
        raise error

    return make


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_router_that_cannot_be_made_takes_no_lora_with_it(save_both, file_nodes, error):
    said = save_both(lambda: LORA, failing(error), "wan")
    assert [path.name for path in file_nodes.folder.iterdir()] == ["wan_lora_autosave_00001_.safetensors"]
    assert said == (
        f"The LoRA is saved as wan_lora_autosave_00001_.safetensors in models/loras. The router is lost: {error}."
    )


def test_a_lora_that_cannot_be_made_takes_no_router_with_it(save_both, file_nodes, pack_module, caplog):
    weights = pack_module("sla2_kernels.weights")
    router = weights.RouterWeights((weights.RouterLayer(torch.eye(8)),), "wan", 2, 8)
    said = save_both(failing(TypeError("no adapter")), lambda: router, "wan")
    assert [path.name for path in file_nodes.folder.iterdir()] == ["wan_lora_autosave_00001_.safetensors"]
    assert said.startswith("The LoRA is lost: no adapter. The router is saved as")
    assert "the LoRA could not be made or saved" in caplog.text and "TypeError" in caplog.text


def test_an_interrupt_while_saving_is_one(save_both):
    class Interrupted(Exception):
        """As comfy.model_management.InterruptProcessingException."""

    with pytest.raises(Interrupted):
        save_both(failing(Interrupted()), failing(Interrupted()), "wan")


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_trained_router_that_cannot_be_made_does_not_hide_why_the_training_ended(file_nodes, pack_module, error):
    files = pack_module("nodes.training.router_files")
    said, advice = files.save_trained(failing(error), "wan_autosave", 40)
    assert (said, advice) == (f"What 40 optimisation steps trained is lost: {error}.", "")
    assert list(file_nodes.folder.iterdir()) == []
