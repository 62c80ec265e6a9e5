"""The weighted mask: each key block's power of two where the mask has 1, in the order of 8-bit matrix instructions; and Z_i."""

import pytest
import torch
from operator_inputs import normal, relative_error

from sla2_kernels.kernels.select import mask_width, new_mask
from sla2_kernels.kernels.weighted_mask import weighted_mask
from sla2_kernels.triton_backend import Workspace

DIM = 32


def weighted(generator, heads, rows, blocks, exponents, first=0):
    """(mask, workspace) of ``heads`` heads after weighted_mask(); the mask has ``first`` heads more, before them."""
    mask = new_mask((first + heads, rows), blocks, torch.float32, "cpu")
    mask.copy_(torch.rand(first + heads, rows, blocks, generator=generator) < 0.7)
    query_sums = torch.full((heads, rows, 3 * DIM), torch.nan)
    work = Workspace(
        norms=normal(generator, heads, blocks, DIM).abs(),
        query_norms=query_sums[..., 2 * DIM :],
        sums_exponent=exponents,
        weights=torch.full((heads, rows, mask_width(blocks)), torch.nan).to(torch.float8_e4m3fn),
        weights_scale=torch.empty(heads),
    )
    weighted_mask(mask, work, slice(first, first + heads))
    return mask[first:], work


def in_block_order(weights):
    """weights with the key blocks of each 16 in their own order: as 8-bit matrix instructions read their left operand."""
    bits = weights.unflatten(-1, (-1, 2, 2, 2, 2))  # of a place: 3 2 1 0, which are the block's 2 1 3 0
    return bits.permute(0, 1, 2, 5, 3, 4, 6).flatten(2)


@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (5, 130), (65, 64), (130, 63), (3, 300)])
def test_weights_are_the_mask_times_each_block_s_power(generator, rows, blocks):
    exponents = torch.randint(-12, 3, (2, blocks), generator=generator).float()
    mask, work = weighted(generator, 2, rows, blocks, exponents)
    weights = in_block_order(work.weights.double()) * work.weights_scale.double()[:, None, None]
    expected = mask.double() * exponents.double().exp2()[:, None] / blocks
    torch.testing.assert_close(weights[..., :blocks], expected, rtol=1e-6, atol=0)
    assert (weights[..., blocks:] == 0).all()


def test_blocks_far_below_the_largest_count_as_zero(generator):
    exponents = torch.tensor([[4.0, -13.0, -14.0, -60.0]])
    mask, work = weighted(generator, 1, 8, 4, exponents)
    weights = in_block_order(work.weights.double())[..., :4] * work.weights_scale.double()[:, None, None] * 4
    kept = torch.tensor([2.0**4, 2.0**-13, 0.0, 0.0], dtype=torch.float64)
    assert torch.equal(weights, mask.double() * kept)


def test_a_group_reads_its_own_heads_of_the_mask(generator):
    mask, work = weighted(generator, 2, 40, 90, torch.zeros(2, 90), first=3)
    weights = in_block_order(work.weights.double())[..., :90]
    assert torch.equal(weights, mask.double() * 2.0**8)
    assert relative_error(work.query_norms, mask.double() @ work.norms.double() / 90) < 1e-6
    before = work.query_norms.as_strided((2, 40, 2 * DIM), work.query_norms.stride(), 0)
    assert before.isnan().all()
