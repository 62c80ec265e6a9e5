"""Training where text or references stand around the video's tokens: the masks and errors are those of the operator's own calls."""

import pytest
import torch

from sla2_kernels import sla2_attention
from sla2_kernels.forced_blocks import select_with_forced_blocks
from sla2_kernels.router import unselected_mask
from sla2_training import RouterTrainer, TrainerOptions
from sla2_training.layer_tensors import LayerTensors
from sla2_training.report import BEFORE

HEADS, DIM, SPARSITY = 2, 16, 0.6
ENDS = {"prefix": (70, 0), "suffix": (0, 33), "both": (70, 33), "whole blocks": (64, 64)}


def tensors(prefix, suffix, video=640, seed=0):
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(1, HEADS, prefix + video + suffix, DIM, generator=generator) for _ in range(2))
    return torch.randn(1, HEADS, video, DIM, generator=generator), k, v


def trainer(**options):
    return RouterTrainer("wan", 1, HEADS, DIM, sparsities=(SPARSITY,), options=TrainerOptions(**options))


@pytest.mark.parametrize("keep_diagonal", [False, True])
@pytest.mark.parametrize(("prefix", "suffix"), ENDS.values(), ids=ENDS)
def test_hard_masks_are_the_operators_selection(prefix, suffix, keep_diagonal):
    q, k, v = tensors(prefix, suffix)
    given = LayerTensors(0, q, k, v, "BHND", None, prefix, suffix)
    blocks = torch.arange(given.query_block_count).expand(1, HEADS, -1)
    training = trainer(keep_diagonal=keep_diagonal)
    masks = training.hard_masks(given.scores(None, None, blocks), training.always_selected(given, blocks), given.forced)
    options = {"sparsity": SPARSITY, "front": prefix, "back": suffix, "keep_diagonal": keep_diagonal}
    selected = select_with_forced_blocks(q, k, **options)
    assert torch.equal(masks[:, :, 0], 1 - unselected_mask(selected, masks.shape[-1], masks.dtype)[0])


def test_the_measured_error_is_that_of_the_operators_output():
    prefix, suffix = ENDS["both"]
    q, k, v = tensors(prefix, suffix)
    errors = trainer(query_blocks=99).evaluate(0, q, k, v, prefix=prefix, suffix=suffix)
    blocks = select_with_forced_blocks(q, k, sparsity=SPARSITY, front=prefix, back=suffix, keep_diagonal=True)
    out = sla2_attention(q, k, v, key_blocks=blocks, precision="16bit")
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert errors.relative(BEFORE, SPARSITY) == pytest.approx(float((out - dense).norm() / dense.norm()), rel=1e-4)


def test_the_router_learns_among_the_blocks_of_video_alone():
    prefix, suffix = ENDS["both"]
    training = trainer()
    for seed in range(3):
        training.observe(0, *tensors(prefix, suffix, seed=seed), steps=2, prefix=prefix, suffix=suffix)
    layer = training.router().layers[0]
    assert training.steps == {0: 6} and layer.alpha_logits is not None
    assert (layer.proj_q - torch.eye(DIM)).abs().max() > 1e-4


def test_a_video_of_one_free_block_teaches_nothing():
    training = trainer()
    assert training.observe(0, *tensors(70, 33, video=100), prefix=70, suffix=33) == 0 and training.steps == {}


def test_gradients_are_not_kept_between_steps():
    """They are as large as the projections, and every layer of a large model would keep its own."""
    training = trainer()
    training.observe(0, *tensors(0, 0))
    assert training.states[0].proj_q.grad is None and training.states[0].proj_k.grad is None
