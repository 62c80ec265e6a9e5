"""An untrained alternative to the linear branch: every unselected key block as one key and one value, their means.

O = m_s / (m_s + m_u) O_s + m_u / (m_s + m_u) O_u, with m_s the selected mass, m_u the estimate of the unselected mass that
SLA2's untrained ratio uses, and O_u the means of the unselected blocks' values weighted by their share of m_u. It is what
sol_attn does with its tail, here per query row, on SLA2's blocks and router.
"""

import torch

from sla2_kernels import K_BLOCK, Q_BLOCK, select_key_blocks, sla2_attention
from sla2_kernels.router import block_count, mean_from_pools, pool_blocks, unselected_mask

from .fitted_sla import sparse_branch


def attention(q, k, v, sparsity):
    """Output (B, N, H, D) in q's dtype for (B, N, H, D) tensors; one head's N x T_n logits at a time."""
    selected = select_key_blocks(q, k, sparsity=sparsity, layout="BNHD", keep_diagonal=True)
    out = sparse_branch(q, k, v, sparsity, keep_diagonal=True).float()
    _, ratio = sla2_attention(
        q, k, v, sparsity=sparsity, precision="16bit", layout="BNHD", return_alpha=True, keep_diagonal=True
    )
    blocks = block_count(k.shape[1], K_BLOCK)
    left = unselected_mask(selected, blocks, torch.float32).bool().repeat_interleave(Q_BLOCK, dim=2)
    k_means, v_means = (pool_blocks(x.transpose(1, 2), K_BLOCK) for x in (k, v))
    k_means = k_means - mean_from_pools(k_means, k.shape[1], K_BLOCK)
    live = torch.full((blocks,), float(K_BLOCK), device=q.device)
    live[-1] = k.shape[1] - (blocks - 1) * K_BLOCK
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            logits = q[b, :, h].float() @ k_means[b, h].T * q.shape[3] ** -0.5 + live.log()
            weights = logits.masked_fill(~left[b, h, : q.shape[1]], -torch.inf).softmax(dim=-1)
            share = ratio[b, h, :, None]
            # a row with nothing unselected has share 1 and no weights
            tail = torch.where(share < 1, weights @ v_means[b, h], 0.0)
            out[b, :, h] = share * out[b, :, h] + (1 - share) * tail
    return out.to(q.dtype)
