"""The router in torch: pool, project, score, and take the top-k key blocks of every query block (Eq. 13).

Everything runs in IEEE float32 (float64 for float64 inputs) from the unquantised tensors: with TF32 or 16-bit operands
1% of a Wan layer's rows would select other blocks.
"""

import math

import torch
import torch.nn.functional as F

from .support import without_autocast

Q_BLOCK = 128  # the paper's; query blocks of a call are one of QUERY_BLOCKS
QUERY_BLOCKS = (Q_BLOCK, 64)
K_BLOCK = 64
MAX_OWN_BLOCKS = Q_BLOCK // K_BLOCK + 1  # key blocks with tokens of one query block, where the grids do not meet
PARTS = 2**40
# Below this mean of phi(q) phi(k) / max phi(q) over the unselected keys the linear branch has no weight, and the ratio is 1.
# Far above the rounding error of float32 and bfloat16: no backend divides by a vanishing sum, and all decide alike.
MIN_LINEAR_WEIGHT = 2.0**-64


def block_count(tokens, block):
    """Number of blocks of ``block`` tokens that ``tokens`` tokens fill; the last one may be ragged."""
    # not -(-tokens // block): torch.compile cannot reason about a symbolic length below zero
    return (tokens + block - 1) // block


def selected_block_count(sparsity, key_block_count):
    """Selected key blocks per query block: max(1, floor((1 - sparsity) * T_n)). The 1e-6 keeps 0.9 * 10 from losing one."""
    # in integer multiples of 2 ** -40: with floats torch.compile would add a guard for a symbolic count of blocks
    kept = math.floor((1 - sparsity) * PARTS) * key_block_count
    count = (kept + PARTS // 10**6) // PARTS
    # sym_max alone takes symbolic counts, and a microsecond
    return max(1, count) if isinstance(count, int) else torch.sym_max(1, count)


def selected_beside(forced, sparsity, blocks):
    """The same where ``forced`` of the blocks, (at the start, at the end), are attended in any case: those, and of the others."""
    free = blocks - sum(forced)
    return sum(forced) + (selected_block_count(sparsity, free) if free else 0)


def compute_dtype(q):
    """What plain torch computes in: float64 for float64 inputs, else float32."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def ratio_per_block(alpha, q, query_block=Q_BLOCK):
    """alpha as one mixing ratio per query block of q (B, H, N, D): (H, T_m) on q's device; None stays None."""
    return (
        None
        if alpha is None
        else resample_ratio(alpha.to(q.device, compute_dtype(q)), block_count(q.shape[2], query_block))
    )


def resample_ratio(alpha, query_block_count):
    """Ratios at A knots, (H,) or (H, A) -> one per query block, (H, T_m): linear, first and last knot at the ends."""
    knots = alpha[:, None] if alpha.dim() == 1 else alpha
    if query_block_count == 1 or knots.shape[1] == 1:
        return knots[:, :1].expand(-1, query_block_count)
    return F.interpolate(knots[None], size=query_block_count, mode="linear", align_corners=True)[0]


def resample_ratio_gradient(grad_ratio, alpha_shape):
    """Gradient of resample_ratio, (H, T_m) -> alpha's (H,) or (H, A); sums in a fixed order, unlike interpolate's own."""
    knots = 1 if len(alpha_shape) == 1 else alpha_shape[1]
    weights = resample_ratio(torch.eye(knots, dtype=grad_ratio.dtype, device=grad_ratio.device), grad_ratio.shape[1])
    return (grad_ratio[:, None] * weights).sum(dim=-1).reshape(alpha_shape)


def pool_blocks(x, block):
    """Means over blocks of ``block`` tokens, (B, H, N, D) -> (B, H, T, D) float32 (float64 for float64)."""
    dtype = compute_dtype(x)
    full = x.shape[2] // block
    pooled = x[:, :, : full * block].unflatten(2, (full, block)).mean(dim=3, dtype=dtype) if full else None
    if full * block == x.shape[2]:
        return pooled
    tail = x[:, :, full * block :].mean(dim=2, keepdim=True, dtype=dtype)
    return tail if pooled is None else torch.cat([pooled, tail], dim=2)


def mean_from_pools(pooled, tokens, block):
    """Mean over all tokens, (B, H, T, D) block means -> (B, H, 1, D), weighting a ragged last block by its valid tokens."""
    valid = torch.full((pooled.shape[2], 1), float(block), dtype=pooled.dtype, device=pooled.device)
    valid[-1] = tokens - (pooled.shape[2] - 1) * block
    return (pooled * valid).sum(dim=2, keepdim=True) / tokens


def project(pooled, proj):
    """x @ W^T as torch.nn.Linear does, W (D, D) or (H, D, D); None is the identity."""
    return pooled if proj is None else pooled @ proj.to(pooled).transpose(-1, -2)


def router_scores(q, k, proj_q=None, proj_k=None, scale=None, query_block=Q_BLOCK):
    """Router logits P_c, (B, H, T_m, T_n), of q (B, H, N, D) and the unsmoothed k (B, H, M, D); None scale is D ** -0.5."""
    with without_autocast(q.device):
        return pool_scores(pool_blocks(q, query_block), pool_blocks(k, K_BLOCK), k.shape[2], proj_q, proj_k, scale)


def pool_scores(q_pooled, k_pooled, tokens, proj_q=None, proj_k=None, scale=None):
    """Router logits of block means (B, H, T, D), those of the unsmoothed k with its number of tokens."""
    scale = q_pooled.shape[-1] ** -0.5 if scale is None else scale
    with without_autocast(q_pooled.device):
        k_pooled = k_pooled - mean_from_pools(k_pooled, tokens, K_BLOCK)
        return project(q_pooled, proj_q) @ project(k_pooled, proj_k).transpose(-1, -2) * scale


def top_k_blocks(scores, count):
    """Indices of the ``count`` largest scores of each row, ascending, int32; of equal scores the lowest index wins."""
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return order.sort(dim=-1).values.to(torch.int32)


def route(q, k, proj_q, proj_k, count, diagonal=None, query_block=Q_BLOCK, forced=(0, 0)):
    """The router's choice, int32 (B, H, T_m, count), ascending; what triton_backend.route() and its attention() do in Triton.

    diagonal: position among the keys of the first query's own key, or None; see with_diagonal(). forced: so many key blocks
    at the start and the end are taken first.
    """
    scores = router_scores(q, k, proj_q, proj_k, query_block=query_block)
    scores[..., : forced[0]] = torch.inf
    scores[..., scores.shape[-1] - forced[1] :] = torch.inf
    return _chosen(scores, count, diagonal, query_block)


def route_pools(q_pooled, k_pooled, tokens, proj_q, proj_k, count, diagonal=None, query_block=Q_BLOCK):
    """route() of block means (B, H, T, D), those of the unsmoothed k with its number of tokens."""
    return _chosen(pool_scores(q_pooled, k_pooled, tokens, proj_q, proj_k), count, diagonal, query_block)


def _chosen(scores, count, diagonal, query_block):
    return top_k_blocks(scores if diagonal is None else with_diagonal(scores, diagonal, query_block), count)


def own_key_blocks(query_blocks, key_block_count, first=0, query_block=Q_BLOCK):
    """Which key blocks hold a query block's own tokens: indices of query blocks (...) -> bool (..., T_n).

    first: the place among the keys of the first query's own key.
    """
    columns = torch.arange(key_block_count, device=query_blocks.device)
    begin = first + query_blocks[..., None] * query_block
    return (columns * K_BLOCK < begin + query_block) & ((columns + 1) * K_BLOCK > begin)


def with_diagonal(scores, first=0, query_block=Q_BLOCK):
    """Scores (..., T_m, T_n) in which the key blocks of each query block's own tokens outrank all others; first as above."""
    rows = torch.arange(scores.shape[-2], device=scores.device)
    return scores.masked_fill(own_key_blocks(rows, scores.shape[-1], first, query_block), torch.inf)


def unselected_mask(key_blocks, key_block_count, dtype):
    """1 - M_c, (B, H, T_m, n) selected indices -> (B, H, T_m, T_n) of ``dtype``."""
    shape = (*key_blocks.shape[:3], key_block_count)
    return torch.ones(shape, dtype=dtype, device=key_blocks.device).scatter(-1, key_blocks.long(), 0.0)
