"""The masked sum: (1 - M_c) x [h | z] / T_n per head, at tiles that the matrices do not fill."""

import pytest
import torch
from operator_inputs import normal, relative_error

from sla2_kernels.kernels.configs import product_config
from sla2_kernels.kernels.masked_sum import masked_sum
from sla2_kernels.kernels.select import new_mask

BARS = {torch.float32: 1e-6, torch.float16: 1e-3}
COLUMNS = 65 * 64


def random_mask(generator, batch_heads, rows, blocks, dtype):
    mask = new_mask((batch_heads, rows), blocks, dtype, "cpu")
    return mask.copy_(torch.rand(batch_heads, rows, blocks, generator=generator) < 0.7)


@pytest.mark.parametrize("dtype", list(BARS))
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_every_card_s_tiles(generator, capability, dtype):
    mask = random_mask(generator, 2, 3, 37, dtype)
    sums = normal(generator, 2, 37, COLUMNS, dtype=dtype)
    out = torch.empty(2, 3, COLUMNS, dtype=dtype)
    masked_sum(mask, sums, out, slice(0, 2), product_config(capability, dtype.itemsize))
    assert relative_error(out, mask.double() @ sums.double() / 37) < BARS[dtype]


@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (1, 130), (65, 64), (130, 63), (129, 257)])
def test_ragged_matrices(generator, rows, blocks):
    mask = random_mask(generator, 1, rows, blocks, torch.float32)
    sums, out = normal(generator, 1, blocks, 200), torch.empty(1, rows, 200)
    masked_sum(mask, sums, out, slice(0, 1), product_config((8, 9), 4))
    expected = mask.double() @ sums.double() / blocks
    assert (out - expected).abs().max() < 1e-5


def test_a_group_reads_its_own_heads_of_the_mask(generator):
    mask = random_mask(generator, 6, 5, 33, torch.float32)
    sums, out = normal(generator, 3, 33, 128), torch.empty(3, 5, 128)
    masked_sum(mask, sums, out, slice(2, 5), product_config((8, 0), 4))
    assert relative_error(out, mask[2:5].double() @ sums.double() / 33) < 1e-6


def test_no_unselected_block_sums_to_exactly_zero(generator):
    mask = new_mask((1, 4), 20, torch.float16, "cpu").fill_(1.0)
    mask[:, 2] = 0
    sums, out = normal(generator, 1, 20, 128, dtype=torch.float16), torch.empty(1, 4, 128, dtype=torch.float16)
    masked_sum(mask, sums, out, slice(0, 1), product_config((8, 9), 2))
    assert (out[:, 2] == 0).all() and (out[:, 0] != 0).any()


def test_sums_of_many_large_blocks_stay_inside_float16():
    mask = new_mask((1, 1), 600, torch.float16, "cpu").fill_(1.0)
    sums, out = torch.full((1, 600, 128), 3e4, dtype=torch.float16), torch.empty(1, 1, 128, dtype=torch.float16)
    masked_sum(mask, sums, out, slice(0, 1), product_config((8, 9), 2))
    assert relative_error(out, torch.full((1, 1, 128), 3e4)) < 1e-3
