"""P V in INT8: its range, V's channels, and the linear branch that the loop's programs take along."""

import pytest
import torch
from operator_inputs import attention_inputs, embedded, normal, relative_error

from sla2_kernels import select_key_blocks, sla2_attention, triton_backend
from sla2_kernels.kernels import int8_attention
from sla2_kernels.kernels.int8_attention import p_log2_range
from sla2_kernels.kernels.int8_pack import int8_pack
from sla2_kernels.kernels.pool import pools
from sla2_kernels.kernels.product_order import channel_at, place_of
from sla2_kernels.triton_backend import Workspace


def value_channels(v):
    return pools(v, v, v, channels=True).v_channel


@pytest.mark.parametrize(
    ("count", "log2_range"), [(1, 7), (35, 7), (2048, 7), (2049, 6), (4096, 6), (4097, 5), (60000, 2)]
)
def test_sums_of_p_times_v_stay_within_int32(count, log2_range):
    assert p_log2_range(count) == log2_range
    assert 2**log2_range * 127 * 64 * count < 2**31


@pytest.mark.parametrize("keys", [1, 70, 3000])
def test_channels_are_powers_of_two_about_their_largest(generator, keys):
    v = normal(generator, 2, 3, keys, 64)
    v[..., 5] *= 30
    v[:, 1] *= 1e-4
    channel = value_channels(embedded(v)).unflatten(0, (2, 3))
    assert torch.equal(channel.log2(), channel.log2().round())
    largest = v.abs().amax(dim=2)
    assert (channel <= largest.clamp_min(2.0**-3 * largest.amax(dim=-1, keepdim=True))).all()
    assert (channel[..., 5] >= (largest[..., 5] / 8 if keys > 1 else 0)).all()


def test_all_zero_values_have_channels_that_can_be_divided_by():
    channel = value_channels(torch.zeros(1, 2, 70, 32))
    assert (channel > 0).all() and (1 / channel).isfinite().all()


@pytest.mark.parametrize("size", [1e-6, 1.0, 3e4])
@pytest.mark.parametrize("keys", [1, 65, 300])
def test_int8_values_are_rounded_to_nearest_in_the_order_of_the_registers(generator, keys, size):
    v = embedded(normal(generator, 1, 2, keys, 64) * size)
    blocks = -(-keys // 64)
    work = Workspace(
        packed_k=torch.empty(2, blocks, 64, 64, dtype=torch.int8),
        k_scale=torch.empty(2, blocks),
        packed_v=torch.empty(2, blocks, 64, 64, dtype=torch.int8),
        v_exponent=torch.empty(2, blocks),
    )
    channel = value_channels(v)
    int8_pack(v, v, torch.zeros(2, 64), work, slice(0, 2), balance=torch.ones(2, 2, 64), v_channel=channel)
    # past the end the last one
    whole = v[0][:, torch.arange(64 * blocks).clamp_max(keys - 1)].unflatten(1, (blocks, 64))
    places = channel_at.fn(torch.arange(64), 64)
    assert torch.equal(places[place_of.fn(torch.arange(64), 64)], torch.arange(64))
    whole, channel = whole[..., places], channel[:, places]
    scale = work.v_exponent.double().exp2()[..., None, None] * channel.double()[:, None, None]
    # in each 16 keys, bits abbc of a key's number become bbac
    ordered = whole.unflatten(2, (4, 2, 4, 2)).transpose(3, 4).flatten(2, 5)
    found = work.packed_v.double().transpose(2, 3)
    assert ((found * scale - ordered.double()).abs() <= 0.501 * scale).all()
    assert found.abs().amax() in (126, 127)


def test_large_channels_leave_the_others_their_precision(generator):
    inputs = attention_inputs(generator, heads=1, tokens=130, keys=420, head_dim=64)
    inputs.v[..., (3, 17)] *= 30
    inputs.alpha = torch.ones(1)
    blocks = select_key_blocks(inputs.q, inputs.k, sparsity=0.5, backend="torch")
    out = sla2_attention(*inputs.tensors(), precision="int8", backend="triton", key_blocks=blocks)
    expected, _ = inputs.reference(blocks)
    # the worst of 64 channels has 0.063 with a deviation of 0.01; in one scale with the large ones it has 0.5
    assert max(relative_error(out[..., d], expected[..., d]) for d in range(64)) < 0.2
    assert relative_error(out, expected) < 0.06


@pytest.mark.parametrize("knots", [None, 0], ids=["estimated", "given"])
def test_the_linear_branch_beside_the_loop_is_the_one_apart(generator, monkeypatch, knots):
    inputs = attention_inputs(generator, heads=1, tokens=300, head_dim=64, dtype=torch.float16, knots=knots)
    options = {"sparsity": 0.5, "precision": "int8", "backend": "triton"}
    beside = sla2_attention(*inputs.tensors(), **options)
    for module in (triton_backend, int8_attention):
        monkeypatch.setattr(module, "takes_linear_branch", lambda q: False)
    # beside the loop the selected blocks' output is what becomes float16 first, apart it is the linear branch's
    assert relative_error(sla2_attention(*inputs.tensors(), **options), beside) < 5e-4
