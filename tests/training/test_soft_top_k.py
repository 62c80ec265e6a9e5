"""SoftTop-k: row sums, the limit of small temperatures, and its gradient."""

import pytest
import torch

from sla2_kernels.router import top_k_blocks, unselected_mask
from sla2_training import soft_top_k
from sla2_training.soft_top_k import soft_top_k_masks


@pytest.mark.parametrize(("width", "count"), [(2, 1), (17, 1), (17, 16), (512, 15), (1182, 118)])
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
def test_rows_sum_to_the_hard_count(width, count, spread):
    torch.manual_seed(0)
    mask = soft_top_k(torch.randn(3, 5, width) * spread, count)
    assert mask.min() >= 0 and mask.max() <= 1
    torch.testing.assert_close(mask.sum(dim=-1), torch.full((3, 5), float(count)), rtol=1e-3, atol=1e-3)


def test_small_tau_is_the_hard_top_k():
    torch.manual_seed(0)
    scores = torch.randn(4, 2, 3, 40, dtype=torch.float64)
    hard = 1 - unselected_mask(top_k_blocks(scores, 6), 40, torch.float64)
    torch.testing.assert_close(soft_top_k(scores, 6, tau=1e-5), hard)


def test_adding_a_constant_to_a_row_changes_nothing():
    torch.manual_seed(0)
    scores = torch.randn(3, 20, dtype=torch.float64)
    torch.testing.assert_close(soft_top_k(scores + 7.0, 4), soft_top_k(scores, 4))


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_gradient_by_gradcheck(tau):
    torch.manual_seed(0)
    scores = 0.3 * torch.randn(3, 11, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: soft_top_k(s, 4, tau), scores.requires_grad_(True))


def test_gradient_by_finite_differences():
    """Central differences of a random linear functional, so that lambda's dependence on every score counts."""
    torch.manual_seed(0)
    scores, weight, step = torch.randn(30, dtype=torch.float64), torch.randn(30, dtype=torch.float64), 1e-6
    leaf = scores.clone().requires_grad_(True)
    (soft_top_k(leaf, 5) @ weight).backward()
    nudges = step * torch.eye(30, dtype=torch.float64)
    numeric = (soft_top_k(scores + nudges, 5) - soft_top_k(scores - nudges, 5)) @ weight / (2 * step)
    torch.testing.assert_close(leaf.grad, numeric, rtol=1e-6, atol=1e-8)
    # what a lambda taken as a constant would give is far from it
    mask = soft_top_k(scores, 5)
    assert (leaf.grad - mask * (1 - mask) * weight / 0.1).norm() > 0.1 * leaf.grad.norm()


def test_gradient_of_a_saturated_row_is_finite():
    scores = torch.tensor([[1000.0, 0.0, 0.0, 0.0]], requires_grad=True)
    soft_top_k(scores, 1, tau=1e-4).square().sum().backward()
    assert torch.isfinite(scores.grad).all()


def test_all_blocks_selected_is_a_mask_of_ones():
    assert torch.equal(soft_top_k(torch.randn(2, 7), 7), torch.ones(2, 7))


def test_several_counts_at_once_are_those_of_each():
    scores, weight = torch.randn(3, 20, dtype=torch.float64), torch.randn(3, 3, 20, dtype=torch.float64)
    together, apart = (scores.clone().requires_grad_() for _ in range(2))
    masks = soft_top_k_masks(together, (1, 6, 20))
    expected = torch.stack([soft_top_k(apart, count) for count in (1, 6, 20)], dim=1)
    torch.testing.assert_close(masks, expected)
    (masks * weight).sum().backward(), (expected * weight).sum().backward()
    torch.testing.assert_close(together.grad, apart.grad)


def test_bad_arguments():
    with pytest.raises(ValueError, match="count must be from 1 to the 7"):
        soft_top_k(torch.randn(2, 7), 8)
    with pytest.raises(ValueError, match="tau must be above 0"):
        soft_top_k(torch.randn(2, 7), 2, tau=0)
