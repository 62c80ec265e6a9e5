"""Attention by key block, as a router's training needs it, against float64: any length, views, keys far from zero."""

import pytest
import torch
from operator_inputs import normal

from sla2_kernels.kernels.key_block_sums import key_block_sums, largest_scores
from sla2_kernels.key_block_sums import why_no_kernels
from sla2_kernels.router import block_count
from sla2_training import step_sums
from sla2_training.layer_tensors import LayerTensors
from sla2_training.step_sums import StepPlan


def sums(q, k, v, scale):
    (pairs, rows, head_dim), blocks = q.shape, block_count(k.shape[1], 64)
    mass, value = torch.empty(pairs, rows, blocks), torch.empty(blocks, pairs, rows, head_dim)
    key_block_sums(q, k, v, largest_scores(q, k, scale), scale, mass, value)
    return mass, value


def expected(q, k, v, scale):
    q, k, v = q.double(), k.double(), v.double()
    scores = q @ k.transpose(1, 2) * scale
    largest = scores.amax(dim=-1, keepdim=True)
    blocks = list(zip((scores - largest).exp().split(64, dim=2), v.split(64, dim=1), strict=True))
    mass = torch.stack([p.sum(dim=2) for p, _ in blocks], dim=2)
    return mass, torch.stack([p @ values for p, values in blocks])


@pytest.mark.parametrize(("rows", "keys", "head_dim"), [(64, 40, 32), (192, 330, 64), (128, 64, 128), (320, 1100, 32)])
def test_sums_are_those_of_float64(generator, rows, keys, head_dim):
    """Keys and values as a model hands them over, a head's tokens apart; keys of a large mean, with an outlier channel."""
    q = normal(generator, 2, rows, head_dim)
    k, v = (normal(generator, keys, 2, head_dim).transpose(0, 1) for _ in range(2))
    k = k + 8 * normal(generator, 2, 1, head_dim)
    q[..., 3], k[..., 3] = 6 * q[..., 3], 6 * k[..., 3] + 40
    q, k, v = (x.half().transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
    scale = head_dim**-0.5
    mass, value = sums(q.contiguous(), k, v, scale)
    true_mass, true_value = expected(q, k, v, scale)
    assert (mass - true_mass).norm() < 2e-5 * true_mass.norm()
    assert (value - true_value).norm() < 2e-5 * true_value.norm()


def hard_step(generator):
    """(tensors, arguments of step_sums()): a ragged layer, keys of a large mean, an outlier channel, rows that keep everything."""
    batch, tokens, prefix, heads, head_dim = 2, 500, 37, 3, 32
    q, k, v = (normal(generator, batch, n, heads, head_dim) for n in (tokens, tokens + prefix, tokens + prefix))
    k = k + 4 * normal(generator, batch, 1, heads, head_dim)
    q[..., 3], k[..., 3] = 4 * q[..., 3], 4 * k[..., 3] + 20
    tensors = LayerTensors(0, *(x.half() for x in (q, k, v)), "BNHD", None, prefix=prefix)
    blocks = tensors.draw(4, generator)
    pairs, key_blocks = batch * heads, block_count(tokens + prefix, 64)
    soft = torch.rand(pairs, 4, 3, key_blocks, generator=generator)
    hard = (torch.rand(pairs, 4, 3, key_blocks, generator=generator) < 0.4).float()
    hard[..., 0], soft[:, 1, 2], hard[:, 1, 2] = 1, 1, 1
    return tensors, (blocks, hard, 2**30, soft, torch.rand(pairs, 4, 3, generator=generator))


def test_kernels_take_16_bit_tensors_of_one_format_on_a_gpu():
    half, full = torch.zeros(2, 8, 64, dtype=torch.float16), torch.zeros(2, 8, 64)
    assert "not of one 16-bit format" in why_no_kernels(half, half, half.bfloat16())
    assert "not of one 16-bit format" in why_no_kernels(full, full, full)
    assert why_no_kernels(half, half, half) == 'backend "torch" was asked for'  # as "auto" does on a CPU


@pytest.mark.parametrize("plan", [StepPlan(3, 3, 4), StepPlan(3, 2, 4), StepPlan(1, 1, 3)])
def test_a_trainings_step_is_that_in_float32(generator, monkeypatch, plan):
    """Whose own test is against float64."""
    tensors, arguments = hard_step(generator)
    plain = step_sums.step_sums(tensors, *arguments)
    monkeypatch.setattr(step_sums, "step_plan", lambda *_: plan)
    tensors.by_kernels = True
    by_kernels = step_sums.step_sums(tensors, *arguments)
    for name in ("product", "norm", "error", "energy", "gradient"):
        found, expected = getattr(by_kernels, name), getattr(plain, name)
        assert (found - expected).norm() < 1e-4 * expected.norm(), name
