"""Logits of thousands to millions: INT8's scores lose no softmax mass there, as FP8's do not, on any kind of card."""

import pytest
import torch
from operator_inputs import attention_inputs, normal, relative_error

from sla2_kernels import select_key_blocks, sla2_attention

pytestmark = pytest.mark.usefixtures("wide_tiles")

# P in INT8, twice; P in FP8, in the loop that converts its scores one by one
CAPABILITIES = ["8.0", "12.0", "9.0"]


def gaussian(factor):
    def change(inputs):
        inputs.q *= factor
        inputs.k *= factor

    return change


def one_channel(factor):
    def change(inputs):
        inputs.q[..., 3] *= factor
        inputs.k[..., 3] *= factor

    return change


LARGE = {
    "logits of 11,000": gaussian(45),
    "logits of 35,000": gaussian(80),
    "logits of 200,000": gaussian(200),
    "one channel times 400": one_channel(400),
    "one channel times 2,000": one_channel(2000),
}
large = pytest.mark.parametrize("change", LARGE.values(), ids=LARGE)


def large_inputs(generator, change, knots=0):
    inputs = attention_inputs(generator, heads=1, tokens=128, keys=330, head_dim=32, knots=knots)
    change(inputs)
    return inputs


@pytest.mark.parametrize("capability", CAPABILITIES)
@large
def test_int8_loses_no_mass(generator, monkeypatch, change, capability):
    monkeypatch.setenv("SLA2_INTERPRET_CAPABILITY", capability)
    inputs = large_inputs(generator, change)
    inputs.v.fill_(1)
    inputs.alpha = torch.ones(1)
    out = sla2_attention(*inputs.tensors(), sparsity=0.5, precision="int8", backend="triton")
    # FP8 rounds a P by 1/16 at most, INT8 the largest of a row by less
    assert (out - 1).abs().max() < 0.07


@large
def test_int8_errs_no_more_than_its_emulation(generator, change):
    """Output and estimated ratio against the definition; rounding to 8 bit alone moves such logits by thousands."""
    inputs = large_inputs(generator, change, knots=None)
    blocks = select_key_blocks(inputs.q, inputs.k, sparsity=0.5, backend="torch")
    options = {"precision": "int8", "key_blocks": blocks, "return_alpha": True}
    emulated, found = (
        sla2_attention(inputs.q, inputs.k, inputs.v, **options, backend=name) for name in ("torch", "triton")
    )
    for ours, theirs, right in zip(found, emulated, inputs.reference(blocks), strict=True):
        assert relative_error(ours, right) < 1.2 * relative_error(theirs, right) + 0.02


@pytest.mark.parametrize("size", [2000, 8000])
def test_int8_keys_one_step_below_the_largest_leave_no_mass(generator, size):
    """A step of INT8 is 40 octaves of P or more here, and 63 of 64 keys are one below the largest."""
    q, k = (normal(generator, 1, 1, 1024, 64, dtype=torch.float16).sign() * size for _ in range(2))
    k[:, :, :64] = along = k[:, :, :1].clone()
    k[:, :, 64:128] = -along
    k[:, :, :63, 0] *= 1 - 1 / 126
    q[:, :, :64] = along
    q[:, :, :64, 0] /= 127
    blocks = torch.arange(2, dtype=torch.int32).expand(1, 1, 16, 2)
    options = {"key_blocks": blocks, "linear_branch": False, "query_block": 64, "precision": "int8"}
    out = sla2_attention(q, k, torch.ones_like(k), backend="triton", **options)
    assert (out[:, :, :64] - 1).abs().max() < 0.02
