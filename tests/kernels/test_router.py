"""Routing in torch: counts, pools, projections, ties, and float32 whatever autocast says."""

import pytest
import torch
from operator_inputs import assert_same_selection, attention_inputs, embedded, normal, relative_error

from sla2_kernels import reference as ref
from sla2_kernels import select_key_blocks
from sla2_kernels.router import (
    block_count,
    mean_from_pools,
    pool_blocks,
    resample_ratio,
    router_scores,
    selected_block_count,
    top_k_blocks,
    unselected_mask,
)


@pytest.mark.parametrize(
    ("sparsity", "blocks", "count"),
    [(0.97, 1, 1), (0.97, 33, 1), (0.97, 34, 1), (0.97, 100, 3), (0.97, 512, 15), (0.95, 1182, 59),
     (0.9, 10, 1), (0.7, 10, 3), (0.5, 3, 1), (0.0, 7, 7), (0.999, 8, 1), (0.4, 5, 3)],
)  # fmt: skip
def test_selected_block_count(sparsity, blocks, count):
    assert selected_block_count(sparsity, blocks) == count


@pytest.mark.parametrize(("tokens", "blocks"), [(1, 1), (63, 1), (64, 1), (65, 2), (32760, 512)])
def test_block_count(tokens, blocks):
    assert block_count(tokens, 64) == blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 300])
def test_block_means_and_the_mean_they_give(generator, tokens, dtype):
    x = embedded(normal(generator, 2, 3, tokens, 16) + 1).to(dtype)
    pooled = pool_blocks(x, 64)
    assert pooled.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative_error(pooled, ref.pool(x.double(), 64)) < 1e-6
    assert relative_error(mean_from_pools(pooled, tokens, 64), x.double().mean(dim=2, keepdim=True)) < 1e-6


def test_ratios_are_resampled_linearly_between_the_ends():
    knots = torch.tensor([[0.2, 0.6], [0.5, 0.1]])
    expected = torch.tensor([[0.2, 0.3, 0.4, 0.5, 0.6], [0.5, 0.4, 0.3, 0.2, 0.1]])
    assert torch.allclose(resample_ratio(knots, 5), expected)
    assert torch.equal(resample_ratio(knots, 1), knots[:, :1])
    assert torch.equal(resample_ratio(knots[:, 0], 3), knots[:, :1].expand(-1, 3))
    assert torch.allclose(resample_ratio(torch.tensor([[0.1, 0.5, 0.3]]), 2), torch.tensor([[0.1, 0.3]]))


def test_top_k_takes_the_lowest_index_of_equal_scores_and_sorts():
    scores = torch.tensor([0.0, 2.0, -0.0, 2.0, -1.0, 2.0])
    assert top_k_blocks(scores, 2).tolist() == [1, 3]
    assert top_k_blocks(scores, 4).tolist() == [0, 1, 3, 5]
    assert top_k_blocks(scores, 5).tolist() == [0, 1, 2, 3, 5]


def test_unselected_mask_is_the_complement():
    mask = unselected_mask(torch.tensor([[[[0, 2]]]], dtype=torch.int32), 4, torch.float16)
    assert mask.tolist() == [[[[0.0, 1.0, 0.0, 1.0]]]]


@pytest.mark.parametrize("proj", [None, "shared", "per head"])
@pytest.mark.parametrize("layout", ["BHND", "BNHD"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_select_key_blocks_against_the_definition(generator, dtype, layout, proj):
    inputs = attention_inputs(generator, batch=2, heads=3, tokens=300, keys=1000, dtype=dtype, proj=proj)
    q, k = (x.transpose(1, 2) if layout == "BNHD" else x for x in (inputs.q, inputs.k))
    found = select_key_blocks(embedded(q), k, inputs.proj_q, inputs.proj_k, sparsity=0.75, layout=layout)
    k_smooth = inputs.k.double() - inputs.k.double().mean(dim=2, keepdim=True)
    scores = ref.router_scores(inputs.q.double(), k_smooth, inputs.proj_q, inputs.proj_k)
    expected = ref.top_k_mask(scores, 4).nonzero()[:, -1].view(2, 3, 3, 4)
    assert_same_selection(found, expected, scores)


def test_a_selection_has_a_shape_without_values():
    q = torch.empty(1, 2, 300, 32, device="meta")
    found = select_key_blocks(q, q, torch.eye(32), sparsity=0.5)
    assert found.device == q.device and found.shape == (1, 2, 3, 2) and found.dtype == torch.int32


def test_an_offset_of_all_keys_moves_no_choice(generator):
    inputs = attention_inputs(generator, heads=1, tokens=130, keys=1000)
    moved = inputs.k + 50 * normal(generator, 64)
    scores = router_scores(inputs.q.double(), inputs.k.double())
    found, expected = (select_key_blocks(inputs.q, k, sparsity=0.75) for k in (moved, inputs.k))
    differing = (found != expected).any(dim=-1)
    gap = scores.sort(dim=-1).values[..., -4] - scores.sort(dim=-1).values[..., -5]
    assert (gap[differing] < 1e-4).all()


def test_autocast_does_not_touch_the_scores(generator):
    inputs = attention_inputs(generator, heads=3, tokens=300, keys=2000, proj="per head")
    arguments = inputs.q, inputs.k, inputs.proj_q, inputs.proj_k
    expected = router_scores(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = router_scores(*arguments)
        selected = select_key_blocks(*arguments, sparsity=0.9)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert torch.equal(selected, select_key_blocks(*arguments, sparsity=0.9))
