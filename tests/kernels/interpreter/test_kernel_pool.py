"""The pooling kernels: block means of any view, and K's mean out of its block means."""

import pytest
import torch
from operator_inputs import embedded, normal, relative_error

from sla2_kernels.kernels.pool import SMOOTH_ROWS, pools, smooth
from sla2_kernels.reference import pool as reference_pool


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "keys", "query_block"),
    [(1, 300, 128), (63, 65, 128), (65, 63, 64), (128, 1, 128), (300, 128, 128), (300, 128, 64)],
)
def test_block_means_of_strided_views(generator, tokens, keys, query_block, dtype):
    q, k = (embedded(normal(generator, 2, 3, count, 64, dtype=dtype) + 1) for count in (tokens, keys))
    found = pools(k, q, query_block=query_block)
    assert relative_error(found.q, reference_pool(q.double(), query_block).flatten(0, 1)) < 1e-6
    assert relative_error(found.k, reference_pool(k.double(), 64).flatten(0, 1)) < 1e-6


@pytest.mark.parametrize("head_dim", [32, 128])
def test_heads_of_one_expanded_tensor_share_their_means(generator, head_dim):
    x = normal(generator, 1, 1, 130, head_dim).expand(2, 3, -1, -1)
    found = pools(x).k
    assert relative_error(found, reference_pool(x.double(), 64).flatten(0, 1)) < 1e-6
    assert torch.equal(found, found[:1].expand_as(found))


@pytest.mark.parametrize("tokens", [1, 64, 65, 64 * SMOOTH_ROWS, 64 * SMOOTH_ROWS + 65])
def test_smoothing_takes_the_mean_over_live_tokens_from_every_block_mean(generator, tokens):
    x = (normal(generator, 1, 2, tokens, 32) + 100).double()
    pooled = reference_pool(x, 64).flatten(0, 1).float()
    mean = smooth(pooled, tokens)
    assert relative_error(mean, x.mean(dim=2).flatten(0, 1)) < 1e-6
    expected = reference_pool(x - x.mean(dim=2, keepdim=True), 64).flatten(0, 1)
    # float32 around 100: each block mean is off by 4e-6 at most; the mean's own error is common to all, and moves no score
    error = pooled - expected
    assert error.abs().max() < 1e-4
    assert (error - error.mean(dim=1, keepdim=True)).abs().max() < 2e-5
