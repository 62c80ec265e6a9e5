"""The router's products: projections x @ W^T, and scores as integers of the same order."""

import pytest
import torch
from operator_inputs import normal, projection, relative_error

from sla2_kernels.kernels.score import project, scores

BATCH, HEADS = 2, 3


def as_float(ordered):
    """The float32 scores behind the integers that the kernel writes."""
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)


@pytest.mark.parametrize("blocks", [1, 63, 65, 130])
@pytest.mark.parametrize("kind", ["shared", "per head"])
def test_projection_is_that_of_a_linear_layer(generator, kind, blocks):
    pooled = normal(generator, BATCH * HEADS, blocks, 64)
    proj = projection(generator, kind, HEADS, 64)
    by_head = pooled.double().unflatten(0, (BATCH, HEADS))
    expected = (by_head @ proj.double().transpose(-1, -2)).flatten(0, 1)
    assert relative_error(project(pooled, proj), expected) < 1e-6


def test_no_projection_is_the_identity(generator):
    pooled = normal(generator, 2, 5, 64)
    assert project(pooled, None) is pooled
    # float16 halves lose what is below 2^-35 of a row's largest
    lost = 2.0**-34 * float(pooled.abs().max())
    assert torch.allclose(project(pooled, torch.eye(64)), pooled, rtol=2.0**-22, atol=lost)


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize(("q_blocks", "k_blocks"), [(1, 1), (3, 65), (64, 64), (65, 130)])
def test_scores_are_all_inner_products(generator, q_blocks, k_blocks, head_dim):
    q, k = (normal(generator, 3, blocks, head_dim) for blocks in (q_blocks, k_blocks))
    found = scores(q, k, 128)
    errors = as_float(found[..., :k_blocks]).double() - q.double() @ k.double().transpose(1, 2)
    # of the operands' norms, not of the products: a product near zero is a sum that cancels
    sizes = q.double().norm(dim=-1)[:, :, None] * k.double().norm(dim=-1)[:, None, :]
    assert (errors.norm() / sizes.norm()).item() < 2e-7
    assert (found[..., k_blocks:] == -(2**31)).all(), "padding that could be selected"


def test_integer_scores_order_as_the_float_ones():
    """Products with one: the scores are the keys' first features, of both signs and all sizes."""
    values = torch.tensor([-3e38, -1.0, -1e-30, 0.0, 1e-30, 0.5, 1.0, 3e38])
    q, k = torch.zeros(1, 1, 32), torch.zeros(1, 8, 32)
    q[..., 0], k[..., 0] = 1, values
    assert (scores(q, k, 128)[0, 0, :8].diff() > 0).all()
