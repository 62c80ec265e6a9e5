"""Attention taken apart by key block, against the operator's float64 definition and the paper's soft formula."""

import pytest
import torch
import torch.nn.functional as F

from sla2_kernels import select_key_blocks
from sla2_kernels.reference import sla2_reference
from sla2_kernels.router import block_count, unselected_mask
from sla2_training.block_sums import block_sums


def random_qkv(tokens=700, keys=None, head_dim=32, heads=2, batch=2):
    torch.manual_seed(0)
    keys = tokens if keys is None else keys
    q, k, v = (1.5 * torch.randn(batch, heads, n, head_dim) for n in (tokens, keys, keys))
    return q, k + 3, v


def all_rows(q, k, v):
    pairs = torch.arange(q.shape[0] * q.shape[1])
    blocks = torch.arange(block_count(q.shape[2], 128)).expand(len(pairs), -1)
    return block_sums(q, k, v, pairs, blocks, q.shape[-1] ** -0.5)


def to_tokens(rows, q):
    """(B * H, r, 128, ...) -> (B, H, N, ...)."""
    return rows.flatten(1, 2)[:, : q.shape[2]].unflatten(0, q.shape[:2])


@pytest.mark.parametrize(("tokens", "keys"), [(700, 700), (1024, 1024), (130, 900), (1, 65), (100, 40)])
def test_dense_target(tokens, keys):
    q, k, v = random_qkv(tokens, keys)
    sums = all_rows(q, k, v)
    dense = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(to_tokens(sums.target, q).double(), dense, rtol=1e-4, atol=1e-5)
    energy = F.pad(dense, (0, 0, 0, -tokens % 128)).square().unflatten(2, (-1, 128)).sum(dim=(-2, -1))
    torch.testing.assert_close(sums.energy().double(), energy.flatten(0, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("tokens", "keys"), [(700, 700), (130, 900), (1, 65)])
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_hard_masks_give_the_operators_output(tokens, keys, sparsity):
    q, k, v = random_qkv(tokens, keys)
    key_blocks = select_key_blocks(q, k, sparsity=sparsity)
    mask = 1 - unselected_mask(key_blocks, block_count(keys, 64), torch.float32).flatten(0, 1)[:, :, None]
    sums = all_rows(q, k, v)
    expected, ratio = sla2_reference(q, k, v, key_blocks=key_blocks)
    estimated = sums.estimated_ratio(mask)
    torch.testing.assert_close(to_tokens(estimated[:, :, 0], q).double(), ratio, rtol=1e-4, atol=1e-5)
    out = sums.output(mask, estimated)
    torch.testing.assert_close(to_tokens(out[:, :, 0], q).double(), expected, rtol=1e-4, atol=1e-5)

    learned = torch.tensor([0.7, 0.4])
    expected, _ = sla2_reference(q, k, v, alpha=learned, key_blocks=key_blocks)
    per_row = learned.repeat(q.shape[0])[:, None, None].expand(-1, mask.shape[1], 1)
    torch.testing.assert_close(
        to_tokens(sums.output(mask, per_row)[:, :, 0], q).double(), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("sharpness", [60, 300])
def test_a_linear_branch_without_weight_counts_as_the_sparse_one(sharpness):
    """Queries and keys sharp in other features: as in the operator, and no ratio is learned of it."""
    q, k, v = random_qkv(200)
    q[:, :, ::2, 5], q[..., 3:5], k[..., 5] = 300, 0, 0  # the logits stay small
    k[..., 3:5] += sharpness * (torch.arange(200)[:, None] % 2 * 2 - 1) * torch.tensor([1, -1])
    key_blocks = select_key_blocks(q, k, sparsity=0.5)
    mask = 1 - unselected_mask(key_blocks, 4, torch.float32).flatten(0, 1)[:, :, None]
    sums = all_rows(q, k, v)
    expected, _ = sla2_reference(q, k, v, alpha=torch.tensor([0.3, 0.3]), key_blocks=key_blocks)
    soft = mask.clone().requires_grad_()
    out = sums.output(soft, torch.full(mask.shape[:3], 0.3))[:, :, 0]
    torch.testing.assert_close(to_tokens(out.detach(), q).double(), expected, rtol=1e-4, atol=1e-5)
    out.sum().backward()
    assert torch.isfinite(soft.grad).all()


def test_everything_selected_is_dense_attention_at_any_ratio():
    q, k, v = random_qkv()
    sums = all_rows(q, k, v)
    mask = torch.ones(4, 6, 1, 11)
    out = sums.output(mask, torch.full((4, 6, 1), 0.3))
    assert float(sums.squared_error(out).sum() / sums.energy().sum()) < 1e-10


def test_soft_masks_follow_the_papers_formula():
    q, k, v = random_qkv()
    mask = torch.rand(4, 6, 1, 11)
    ratio = torch.full((4, 6, 1), 0.6)
    k_smooth = k - k.mean(dim=2, keepdim=True)
    m = mask[:, :, 0].repeat_interleave(128, dim=1).repeat_interleave(64, dim=2)[:, :700, :700].unflatten(0, (2, 2))
    p = m * torch.exp(q @ k_smooth.transpose(2, 3) * q.shape[-1] ** -0.5)
    o_sparse = p @ v / p.sum(dim=-1, keepdim=True)
    linear = (1 - m) * (q.softmax(dim=-1) @ k_smooth.softmax(dim=-1).transpose(2, 3))
    o_linear = linear @ v / linear.sum(dim=-1, keepdim=True)
    out = to_tokens(all_rows(q, k, v).output(mask, ratio)[:, :, 0], q)
    torch.testing.assert_close(out, 0.6 * o_sparse + 0.4 * o_linear, rtol=1e-3, atol=1e-4)


def test_selected_share_is_the_softmax_mass():
    q, k, v = random_qkv()
    mask = torch.zeros(4, 6, 1, 11)
    mask[..., [1, 10]] = 1
    softmax = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(dim=-1)
    expected = softmax[..., 64:128].sum(dim=-1) + softmax[..., 640:].sum(dim=-1)
    torch.testing.assert_close(
        to_tokens(all_rows(q, k, v).selected_share(mask)[:, :, 0], q), expected, rtol=1e-3, atol=1e-5
    )
