"""The top-k kernel: exactly the largest scores, the lowest index where scores are equal, ascending, and the mask."""

import pytest
import torch
from operator_inputs import normal

from sla2_kernels.kernels.select import CHUNK, select
from sla2_kernels.reference import top_k_mask


def ordered(scores):
    """float32 scores as the integers that select() takes, padded as scores() pads."""
    bits = (scores + 0.0).view(torch.int32)
    padding = (0, -scores.shape[2] % 128)
    return torch.nn.functional.pad(bits ^ ((bits >> 31) & 0x7FFFFFFF), padding, value=-(2**31))


def assert_selects(scores, count, dtype=torch.float32):
    """Checks one call against a stable sort in float64."""
    selected = torch.empty(*scores.shape[:2], count, dtype=torch.int32)
    unselected = select(ordered(scores), scores.shape[2], selected, dtype)
    chosen = top_k_mask(scores.double() + 0.0, count)
    expected = chosen.nonzero()[:, -1].view(*scores.shape[:2], count)
    assert selected.dtype == torch.int32 and torch.equal(selected, expected.int())
    assert unselected.dtype == dtype and torch.equal(unselected, 1 - chosen.to(dtype))
    whole_rows = unselected.as_strided((*scores.shape[:2], unselected.stride(1)), unselected.stride())
    assert (whole_rows[..., scores.shape[2] :] == 0).all()


@pytest.mark.parametrize("blocks", [1, 31, CHUNK, CHUNK + 1, 2 * CHUNK + 77])
@pytest.mark.parametrize("share", [0.03, 0.5, 1.0])
def test_random_scores(generator, blocks, share):
    assert_selects(normal(generator, 2, 2, blocks), max(1, int(share * blocks)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_mask_takes_the_dtype_of_the_sums(generator, dtype):
    assert_selects(normal(generator, 1, 2, 70), 9, dtype)


def test_no_mask_where_none_is_asked_for(generator):
    scores = normal(generator, 1, 2, 70)
    selected = torch.empty(1, 2, 9, dtype=torch.int32)
    assert select(ordered(scores), 70, selected, None) is None
    assert torch.equal(selected.long(), top_k_mask(scores.double(), 9).nonzero()[:, -1].view(1, 2, 9))


@pytest.mark.parametrize("count", [1, 200, CHUNK, CHUNK + 1, 700])
def test_all_equal_scores_take_the_lowest_indices(generator, count):
    level = normal(generator, 1).item()
    assert_selects(torch.full((1, 2, 700), level), count)


@pytest.mark.parametrize("count", [1, 17, 600, 1100])
def test_ties_at_the_cut_take_the_lowest_index_across_chunks(generator, count):
    assert_selects(torch.randint(-2, 3, (1, 4, 1100), generator=generator).float(), count)


@pytest.mark.parametrize("count", [1, 50, 99])
def test_all_scores_negative(generator, count):
    assert_selects(-normal(generator, 1, 3, 100).abs() - 1e-3, count)


def test_negative_zero_equals_zero():
    scores = torch.tensor([-0.0, 0.0, -1.0, -0.0, 0.0]).expand(1, 1, -1).contiguous()
    assert_selects(scores, 1)
    assert_selects(scores, 3)


def test_extreme_scores_keep_their_order():
    tiny, huge = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    values = [0.0, tiny, -tiny, huge, -huge, torch.inf, -torch.inf, 1.0, tiny / 4, -tiny / 4]
    scores = torch.tensor(values).view(1, 1, -1)
    for count in range(1, len(values) + 1):
        assert_selects(scores, count)
