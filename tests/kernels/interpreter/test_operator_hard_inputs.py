"""Inputs that real layers have and Gaussian ones do not: offsets, outlier channels, equal keys, empty values.

Low bit is held to what its torch emulation loses on the same input: the formats set that error, not the kernels.
"""

import pytest
import torch
from operator_inputs import attention_inputs, relative_error

from sla2_kernels import select_key_blocks, sla2_attention, torch_backend
from sla2_kernels.quantization import BALANCE_ROWS

pytestmark = [
    pytest.mark.usefixtures("wide_tiles"),
    # numpy's word where the unselected mass is that much larger: the ratio is then 0, as it should be
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2"),
]

BARS = {torch.float32: 1e-4, torch.float16: 5e-3}


def keys_with_an_offset(inputs):
    inputs.k += 100


def outlier_channels(inputs):
    for channel in (3, 17):
        inputs.k[..., channel] *= 15
        inputs.q[..., channel] *= 10


def large_queries_and_keys(inputs):
    inputs.q *= 6
    inputs.k *= 6


def values_with_an_offset(inputs):
    inputs.v += 10


def tiny_values(inputs):
    inputs.v *= 1e-3


def uneven_values(inputs):
    inputs.v *= torch.logspace(-3, 3, inputs.v.shape[2])[:, None].to(inputs.v.dtype)


def zero_value_block(inputs):
    inputs.v[:, :, 64:192] = 0


def one_hot_values(inputs):
    inputs.v.zero_()
    tokens = torch.arange(inputs.v.shape[2])
    inputs.v[:, :, tokens, tokens % inputs.v.shape[3]] = 1


def equal_keys(inputs):
    inputs.k[:] = inputs.k[:, :, :1]


HARD = [
    keys_with_an_offset, outlier_channels, large_queries_and_keys, values_with_an_offset, tiny_values, uneven_values,
    zero_value_block, one_hot_values, equal_keys,
]  # fmt: skip


def run(inputs, precision, backend):
    """(out, reference) on the selection that the torch router makes, with alpha estimated."""
    key_blocks = select_key_blocks(inputs.q, inputs.k, sparsity=0.5, backend="torch")
    out = sla2_attention(inputs.q, inputs.k, inputs.v, precision=precision, backend=backend, key_blocks=key_blocks)
    return out, inputs.reference(key_blocks)[0]


@pytest.mark.parametrize("dtype", list(BARS))
@pytest.mark.parametrize("change", HARD)
def test_16_bit(generator, change, dtype):
    inputs = attention_inputs(generator, heads=1, tokens=130, keys=420, dtype=dtype, knots=None)
    change(inputs)
    assert relative_error(*run(inputs, "16bit", "triton")) < BARS[dtype]


def int8_linear_sums(*blocks, exact=torch_backend._linear_sums):
    """torch_backend._linear_sums() with h_j in INT8: its columns over V's channel powers, each block over one of its own."""
    h, z = exact(*blocks).split([blocks[1].shape[-1], 1], dim=-1)
    v = blocks[1][blocks[2]]
    largest = v[torch.arange(BALANCE_ROWS) * len(v) // BALANCE_ROWS].abs().amax(dim=0)
    channel = largest.maximum(largest.max() / 8).log2().floor().exp2()
    power = channel * ((h / channel).abs().amax(dim=(1, 2), keepdim=True) / 127).log2().ceil().exp2()
    return torch.cat([(h / power).round() * power, z], dim=-1)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("change", HARD)
def test_low_bit_loses_no_more_than_its_emulation(generator, monkeypatch, change, precision):
    inputs = attention_inputs(generator, heads=1, tokens=130, keys=420, knots=None)
    change(inputs)
    if change in (one_hot_values, uneven_values) and precision == "int8":
        # it counts here that h_j is in INT8 too: every third channel has none of its ones among the rows sampled for its power,
        # and where the largest values are not selected, the output is that of the linear branch
        monkeypatch.setattr(torch_backend, "_linear_sums", int8_linear_sums)
    emulated = relative_error(*run(inputs, precision, "torch"))
    # uneven values: the last few make nearly all of the output, and its error strays by 15%
    bar = (1.5 if change is uneven_values else 1.2) * emulated + 5e-3
    assert relative_error(*run(inputs, precision, "triton")) < bar


@pytest.mark.parametrize("empty", [0, 1, 2], ids=["first", "middle", "last"])
@pytest.mark.parametrize(("precision", "bar"), [("16bit", 1e-5), ("int8", 6e-2), ("fp8", 1e-1)])
def test_an_empty_value_block_counts_wherever_it_stands_in_the_selection(generator, precision, bar, empty):
    """The last one is the first that the loop meets: what it leaves in a row's sum must shrink with the row's reference."""
    inputs = attention_inputs(generator, heads=1, tokens=130, keys=420, knots=None)
    inputs.v[:, :, 64 * empty : 64 * empty + 64] = 0
    key_blocks = torch.arange(3, dtype=torch.int32).expand(1, 1, 2, 3)
    out = sla2_attention(*inputs.tensors(), key_blocks=key_blocks, precision=precision, backend="triton")
    assert relative_error(out, inputs.reference(key_blocks)[0]) < bar


@pytest.mark.parametrize("precision", ["16bit", "int8", "fp8"])
def test_equal_keys_and_equal_values_come_back(generator, precision):
    inputs = attention_inputs(generator, heads=1, tokens=130, keys=300, knots=None)
    equal_keys(inputs)
    inputs.v[:] = 0.75
    out = sla2_attention(*inputs.tensors(), sparsity=0.5, precision=precision, backend="triton")
    assert (out - 0.75).abs().max() < (1e-6 if precision == "16bit" else 2e-2)


@pytest.mark.parametrize("sharpness", [20, 110])
@pytest.mark.parametrize("precision", ["16bit", "int8", "fp8"])
def test_features_that_float16_cannot_hold_leave_no_nan(generator, precision, sharpness):
    """Every key is sharp in channel 3 or 4, every query in 5: phi(K) there is 1e-9, below float16."""
    inputs = attention_inputs(generator, heads=1, tokens=130, keys=300, dtype=torch.float16)
    inputs.q[..., 5] += sharpness
    sign = torch.arange(300) % 2 * 2 - 1
    inputs.k[..., 3] += 20 * sign
    inputs.k[..., 4] -= 20 * sign
    out = sla2_attention(*inputs.tensors(), sparsity=0.5, precision=precision, backend="triton")
    slack = 0.1 * inputs.v.abs().max()
    assert (out <= inputs.v.amax(dim=2, keepdim=True) + slack).all()
    assert (out >= inputs.v.amin(dim=2, keepdim=True) - slack).all()
