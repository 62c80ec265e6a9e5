"""The emulated number formats: rounding to nearest on their grids, and the straight-through gradient."""

import pytest
import torch
from operator_inputs import normal

from sla2_kernels import quantization as quant

BLOCK = (-2, -1)
BLOCK_FORMATS = [quant.fake_int8, quant.fake_fp8, quant.fake_fp8_exponent]


def block_maximum(x):
    return x.abs().amax(dim=BLOCK, keepdim=True)


def test_int8_rounds_to_the_nearest_of_255_levels_per_block(generator):
    x = normal(generator, 5, 64, 32) * torch.logspace(-3, 3, 5)[:, None, None]
    levels = quant.fake_int8(x, BLOCK) / (block_maximum(x) / 127)
    assert (levels - levels.round()).abs().max() < 1e-4
    assert (levels - x / (block_maximum(x) / 127)).abs().max() <= 0.5001
    assert torch.allclose(block_maximum(levels), torch.tensor(127.0))


@pytest.mark.parametrize("form", [quant.fake_fp8, quant.fake_fp8_exponent])
def test_fp8_keeps_three_mantissa_bits(generator, form):
    x = normal(generator, 5, 64, 32) * torch.logspace(-3, 3, 5)[:, None, None]
    error = (form(x, BLOCK) - x).abs()
    # half a step: 2 ** -4 of a normal number, 2 ** -10 of the scale below; the scale is at most 2 / 448 of the maximum
    assert (error <= torch.maximum(x.abs() * 2.0**-4, block_maximum(x) / 224 * 2.0**-10) * 1.001).all()


def test_values_stay_on_their_grid_where_the_scale_is_a_power_of_two():
    x = torch.tensor([[1.0, 0.875, -0.5, 0.0625]])
    assert torch.equal(quant.fake_fp8_exponent(x, BLOCK), x)
    assert torch.equal(quant.fake_fp8_exponent(x * 2.0**-20, BLOCK), x * 2.0**-20)


def test_probabilities_are_exact_at_0_and_1_and_close_between(generator):
    p = torch.rand(1000, generator=generator)
    rounded = quant.fake_fp8_probabilities(p)
    assert ((rounded - p).abs() <= torch.maximum(p * 2.0**-4, torch.full_like(p, 2.0**-18)) * 1.001).all()
    assert quant.fake_fp8_probabilities(torch.tensor([0.0, 1.0])).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("form", BLOCK_FORMATS)
def test_a_block_of_zeros_stays_zero(form):
    assert torch.equal(form(torch.zeros(2, 64, 16), BLOCK), torch.zeros(2, 64, 16))


@pytest.mark.parametrize("form", BLOCK_FORMATS)
def test_one_block_s_size_does_not_reach_another(generator, form):
    x = normal(generator, 2, 64, 16)
    alone = form(x[:1], BLOCK)
    assert torch.equal(form(x * torch.tensor([1.0, 1000.0])[:, None, None], BLOCK)[:1], alone)


@pytest.mark.parametrize("form", [*BLOCK_FORMATS, lambda x, _: quant.fake_fp8_probabilities(x)])
def test_the_gradient_passes_straight_through(generator, form):
    x = torch.rand(2, 64, 16, generator=generator, requires_grad=True)
    weight = normal(generator, 2, 64, 16)
    (form(x, BLOCK) * weight).sum().backward()
    assert torch.equal(x.grad, weight)
