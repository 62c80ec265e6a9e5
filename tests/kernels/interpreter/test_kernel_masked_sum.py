"""The masked sum: (1 - M_c) x [h | z] / T_n per head, at tiles that the matrices do not fill."""

import pytest
import torch
from operator_inputs import normal, relative_error

from sla2_kernels.kernels.configs import INT8_PRODUCT, product_config
from sla2_kernels.kernels.masked_sum import int8_masked_sum, masked_sum
from sla2_kernels.kernels.product_order import channel_at
from sla2_kernels.kernels.select import mask_width, new_mask
from sla2_kernels.kernels.weighted_mask import int8_weighted_mask
from sla2_kernels.triton_backend import Workspace

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


def int8_sums(generator, rows, blocks, exponents, first=0, heads=2, dim=32):
    """(sums (H, rows, D * D), what they should be) of random INT8 h_j over these exponents, float32 (H, T_n)."""
    mask = random_mask(generator, first + heads, rows, blocks, torch.float32)
    h = torch.randint(-127, 128, (heads, blocks, dim * dim), generator=generator, dtype=torch.int8)
    channel = torch.randint(-3, 4, (first + heads, dim), generator=generator).float().exp2()
    query_sums = torch.full((heads, rows, (dim + 1) * dim), torch.nan)
    work = Workspace(
        sums=h, norms=torch.rand(heads, blocks, dim, generator=generator), sums_exponent=exponents,
        query_sums=query_sums, query_norms=query_sums[..., dim * dim :],
        weights=torch.full((heads, 2, rows, mask_width(blocks)), -128, dtype=torch.int8),
        weights_scale=torch.empty(heads), bands=torch.zeros(heads, dtype=torch.int32),
    )  # fmt: skip
    group = slice(first, first + heads)
    int8_weighted_mask(mask, work, group, register_order=False)
    assert (work.weights[..., blocks:][:, 0] == 0).all()
    int8_masked_sum(work, channel, group, INT8_PRODUCT)
    weighted = mask[group].double() * exponents.double().exp2()[:, None]
    of_columns = channel[group][:, channel_at.fn(torch.arange(dim), dim)]
    expected = (weighted @ h.double() / blocks).unflatten(2, (dim, dim)) * of_columns[:, None, None]
    torch.testing.assert_close(work.query_norms, mask[group] @ work.norms / blocks)
    return work, query_sums[..., : dim * dim], expected.flatten(2)


@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (5, 130), (130, 63), (3, 257)])
def test_int8_sums_of_blocks_of_like_size_are_exact(generator, rows, blocks):
    exponents = torch.randint(-5, 2, (2, blocks), generator=generator).float()
    work, found, expected = int8_sums(generator, rows, blocks, exponents, first=1)
    assert (work.bands == 1).all()
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-12)


def test_int8_sums_of_small_blocks_count_beside_large_ones(generator):
    exponents = torch.randint(-13, 1, (2, 300), generator=generator).float()
    exponents[0] = torch.randint(-13, -9, (300,), generator=generator)
    exponents[0, 7] = 0
    exponents[1, 3] = -60  # an empty block
    state = generator.get_state()
    work, found, expected = int8_sums(generator, 4, 300, exponents)
    assert work.bands.tolist() == [2, 2]
    # the small ones are rounded once, to half a step of the large ones
    step = 2.0**-6 / 300 * 8
    assert (found.double() - expected).abs().max() <= 0.51 * step
    # the first head has all but one of its blocks in the second band
    exponents[0, exponents[0] <= -7] = -60
    _, without, _ = int8_sums(generator.set_state(state), 4, 300, exponents)
    error = relative_error(found[0], expected[0])
    assert error < 0.02 and relative_error(without[0], expected[0]) > 5 * error
