"""The kernels that pack rows to INT8 for the exchange between GPUs and open them, and routing from block means, in Triton."""

import pytest
import torch
from operator_inputs import normal

from sla2_kernels import select_key_blocks
from sla2_kernels.eight_bit_exchange import EightBitExchange, Share
from sla2_kernels.pool_routing import PoolRouting


def exchanges(q, k, v, processes, routing):
    """One EightBitExchange per process, each of its share of the tokens."""
    parts = zip(*(x.chunk(processes, dim=1) for x in (q, k, v)), strict=True)
    return [EightBitExchange(*part, processes, rank, routing) for rank, part in enumerate(parts)]


def opened_by(rank, made, part, heads):
    """What attend() of process ``rank`` would get: the messages of all, without processes."""
    return made[rank].opened(torch.stack([one.message(part)[rank] for one in made]), heads)


def test_rows_come_back_within_half_a_step_and_select_the_same(generator):
    processes, dtype = 2, torch.float16
    q, k, v = (normal(generator, 2, 400, 4, 32, dtype=dtype) for _ in range(3))
    k = k + 7
    proj = normal(generator, 4, 32, 32)
    made = exchanges(q, k, v, processes, PoolRouting(0.5, proj, None, backend="triton", keep_diagonal=True))
    assert all(one.triton for one in made)
    rank, share = processes - 1, 4 // processes
    heads = slice(rank * share, rank * share + 1)
    *opened, same_heads, selected = opened_by(rank, made, slice(0, 1), heads)
    assert same_heads == heads
    for x, whole in zip(opened, (q, k, v), strict=True):
        expected = whole[:, :, heads]
        assert x.shape == expected.shape and x.dtype == dtype
        assert ((x - expected).abs() <= expected.abs().amax(dim=-1, keepdim=True) / 254 * 1.01 + 1e-3).all()
    # k's large mean does not widen its steps
    assert (opened[1] - k[:, :, heads]).abs().max() < 0.03
    options = {"sparsity": 0.5, "layout": "BNHD", "backend": "triton", "keep_diagonal": True}
    assert torch.equal(selected.key_blocks, select_key_blocks(q, k, proj, None, **options)[:, heads])


def test_a_row_that_is_not_finite_opens_as_nan(generator):
    q, k, v = (normal(generator, 1, 160, 2, 32) for _ in range(3))
    q[0, 3, 0, 5], v[0, 159, 0, 0] = torch.nan, torch.inf
    made = exchanges(q, k, v, 2, PoolRouting(0.5, backend="triton"))
    q_opened, _, v_opened, _, _ = opened_by(0, made, slice(0, 1), slice(0, 1))
    for x, row in ((q_opened, 3), (v_opened, 159)):
        assert x[0, row].isnan().all() and x.isnan().sum() == 32


@pytest.mark.parametrize(
    ("share", "whole", "border"),
    [
        ((0, 300), (0, 256), 44),
        ((300, 600), (384, 512), 172),
        ((130, 200), (200, 200), 70),
        ((128, 256), (128, 256), 0),
    ],
)
def test_which_tokens_form_whole_blocks(share, whole, border):
    found = Share(*share)
    assert (found.first, found.last, found.border) == (*whole, border)
