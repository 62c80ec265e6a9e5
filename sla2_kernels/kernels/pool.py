"""Block means of Q and K, and K's mean over all tokens, which follows from its block means.

_pool: one program per (block, batch x head) reads its block once.
_smooth: one program per (batch x head, slice of features) turns K's block means into K's mean and smoothed block means.
"""

import torch
import triton
import triton.language as tl

from ..router import block_count
from .launch import launch
from .tiles import load_tile, plane_of, valid_rows

SMOOTH_ROWS = 128  # twice as many take 0.006 ms off 14B-720p, and twice the error of K's mean
SMOOTH_FEATURES = 32


@triton.jit(do_not_specialize=["heads", "tokens"])
def _pool(x, pooled, stride_b, stride_h, stride_n, stride_d, heads, tokens, D: tl.constexpr, BLOCK: tl.constexpr):
    block, bh = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, D)
    tile = load_tile(plane_of(x, bh, heads, stride_b, stride_h), rows, d, stride_n, stride_d, tokens)  # [BLOCK, D]
    valid = tl.minimum(tokens - block * BLOCK, BLOCK).to(tl.float32)
    mean = tl.sum(tile.to(tl.float32), axis=0) / valid  # [D]
    tl.store(pooled + (bh * tl.num_programs(0) + block) * D + d, mean)


@triton.jit(do_not_specialize=["tokens", "blocks"])
def _smooth(pooled, mean, means, tokens, blocks, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    bh = tl.program_id(0).to(tl.int64)
    features = tl.program_id(1) * COLS + tl.arange(0, COLS)
    base = pooled + bh * blocks * D + features
    total = tl.zeros([COLS], dtype=tl.float32)
    for start in range(0, blocks, ROWS):
        rows = start + tl.arange(0, ROWS)
        tile = tl.load(base + rows[:, None] * D, mask=rows[:, None] < blocks, other=0.0)  # [ROWS, COLS]
        total += tl.sum(tile * valid_rows(rows, tokens)[:, None], axis=0)
    token_mean = total / tokens  # [COLS]
    tl.store(mean + bh * D + features, token_mean)
    for start in range(0, blocks, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = rows[:, None] < blocks
        tile = tl.load(base + rows[:, None] * D, mask=inside, other=0.0) - token_mean  # [ROWS, COLS]
        tl.store(base + rows[:, None] * D, tile, mask=inside)
        if means is not None:
            at = means + bh * blocks * D + features + rows[:, None] * D
            tl.store(at, tile.to(means.dtype.element_ty), mask=inside)


def pool(x, block):
    """Block means of x (B, H, N, D), any stride -> float32 (B * H, T, D)."""
    batch, heads, tokens, head_dim = x.shape
    pooled = torch.empty(batch * heads, block_count(tokens, block), head_dim, dtype=torch.float32, device=x.device)
    grid = (pooled.shape[1], pooled.shape[0])
    launch(_pool, grid, x, pooled, *x.stride(), heads, tokens, D=head_dim, BLOCK=block, options={"num_warps": 2})
    return pooled


def smooth(pooled, tokens, means=None):
    """Subtracts K's mean over tokens from its block means (B * H, T, D) in place; returns that mean, float32 (B * H, D).

    means: (B * H, T, D) of another dtype, or None: where a copy of the smoothed block means goes.
    """
    rows, blocks, head_dim = pooled.shape
    mean = torch.empty(rows, head_dim, dtype=torch.float32, device=pooled.device)
    launch(
        _smooth, (rows, head_dim // SMOOTH_FEATURES), pooled, mean, means, tokens, blocks,
        D=head_dim, ROWS=SMOOTH_ROWS, COLS=SMOOTH_FEATURES, options={"num_warps": 4},
    )  # fmt: skip
    return mean
