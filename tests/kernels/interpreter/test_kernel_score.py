"""The router's products: projections x @ W^T and scores, float32 whatever the weights' dtype and strides."""

import pytest
import torch
from operator_inputs import normal, projection, relative_error

from sla2_kernels.kernels.score import project, scores

BATCH, HEADS = 2, 3


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
    assert torch.equal(project(pooled, torch.eye(64)), pooled)


def test_projection_takes_a_transposed_float64_weight(generator):
    pooled, proj = normal(generator, 2, 5, 64), normal(generator, 64, 64).double().T
    assert relative_error(project(pooled, proj), pooled.double() @ proj.T) < 1e-6


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize(("q_blocks", "k_blocks"), [(1, 1), (3, 65), (64, 64), (65, 130)])
def test_scores_are_all_inner_products(generator, q_blocks, k_blocks, head_dim):
    q, k = (normal(generator, 3, blocks, head_dim) for blocks in (q_blocks, k_blocks))
    assert relative_error(scores(q, k), q.double() @ k.double().transpose(1, 2)) < 1e-6
