"""One read of Q and K: their block means, how large their channels are, and K's mean over all tokens.

_pools: one program per (block of K or of Q, batch x head) reads its block once; two more per head take the samples of
channels.py.
_smooth: one program per (batch x head, slice of features) turns K's block means into K's mean, which follows from them, and
smoothed block means.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..router import K_BLOCK, block_count
from .channels import SAMPLED, STEP, balance_channels, value_powers
from .launch import launch
from .planes import EVICT_FIRST, load_tile, plane_of, valid_rows

SMOOTH_ROWS = 128  # twice as many take 0.006 ms off 14B-720p, and twice the error of K's mean
SMOOTH_FEATURES = 32


@dataclass(frozen=True)
class Pools:
    """Block means of Q and K, float32 (B * H, T, D); None where they were not asked for, like the rest.

    balance: float32 (B * H, 2, D), what K's channels, and Q's, are multiplied with before they become INT8.
    v_channel: float32 (B * H, D), the powers of two that V's channels are divided by before they do.
    """

    k: torch.Tensor
    q: torch.Tensor | None
    balance: torch.Tensor | None
    v_channel: torch.Tensor | None


@triton.jit
def _block_mean(plane, pooled, block, stride_n, stride_d, tokens, D: tl.constexpr, BLOCK: tl.constexpr):
    rows = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, D)
    tile = load_tile(plane, rows, d, stride_n, stride_d, tokens, EVICT_FIRST)  # [BLOCK, D]
    valid = tl.minimum(tokens - block * BLOCK, BLOCK).to(tl.float32)
    tl.store(pooled + d, tl.sum(tile.to(tl.float32), axis=0) / valid)


@triton.jit(do_not_specialize=["heads", "q_tokens", "k_tokens", "q_blocks", "k_blocks"])
def _pools(
    q, k, v, q_pooled, k_pooled, balance, v_channel,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d, heads, q_tokens, k_tokens, q_blocks, k_blocks,
    D: tl.constexpr, Q_ROWS: tl.constexpr, K_ROWS: tl.constexpr, SAMPLED: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    job, bh = tl.program_id(0), tl.program_id(1)
    if balance is not None:
        # the samples of all heads first, which take longest
        number = bh * tl.num_programs(0) + job
        job = (number // tl.num_programs(1) + k_blocks + q_blocks) % tl.num_programs(0)
        bh = number % tl.num_programs(1)
    bh = bh.to(tl.int64)
    k_plane = plane_of(k, bh, heads, k_stride_b, k_stride_h)
    if job < k_blocks:
        _block_mean(k_plane, k_pooled + (bh * k_blocks + job) * D, job, k_stride_n, k_stride_d, k_tokens, D, K_ROWS)
    elif job < k_blocks + q_blocks:
        if q_pooled is not None:
            block = job - k_blocks
            q_plane = plane_of(q, bh, heads, q_stride_b, q_stride_h)
            at = q_pooled + (bh * q_blocks + block) * D
            _block_mean(q_plane, at, block, q_stride_n, q_stride_d, q_tokens, D, Q_ROWS)
    elif job == k_blocks + q_blocks:
        if balance is not None:
            balance_channels(
                plane_of(q, bh, heads, q_stride_b, q_stride_h), k_plane, balance + bh * (2 * D),
                q_stride_n, q_stride_d, k_stride_n, k_stride_d, q_tokens, k_tokens, D, SAMPLED, STEP,
            )  # fmt: skip
    else:
        if v_channel is not None:
            v_plane = plane_of(v, bh, heads, v_stride_b, v_stride_h)
            value_powers(v_plane, v_channel + bh * D, v_stride_n, v_stride_d, k_tokens, D, SAMPLED, STEP)


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


def pools(k, q=None, v=None, *, query_block=None, balance=False, channels=False):
    """Pools of k, and of q in blocks of ``query_block`` unless that is None, any stride (B, H, T, D); the samples that ``balance`` (of q and k) and
    ``channels`` (of v, which implies balance) ask for."""
    batch, heads, k_tokens, head_dim = k.shape
    q, v = k if q is None else q, k if v is None else v
    queries = query_block is not None
    q_blocks, k_blocks = block_count(q.shape[2], query_block) if queries else 0, block_count(k_tokens, K_BLOCK)

    def empty(wanted, *shape):
        return torch.empty(batch * heads, *shape, dtype=torch.float32, device=k.device) if wanted else None

    found = Pools(
        empty(True, k_blocks, head_dim),
        empty(queries, q_blocks, head_dim),
        empty(balance or channels, 2, head_dim),
        empty(channels, head_dim),
    )
    jobs = k_blocks + q_blocks + (2 if channels else 1 if balance else 0)
    launch(
        _pools, (jobs, batch * heads), q, k, v, found.q, found.k, found.balance, found.v_channel,
        *q.stride(), *k.stride(), *v.stride(), heads, q.shape[2], k_tokens, q_blocks, k_blocks,
        D=head_dim, Q_ROWS=query_block or K_BLOCK, K_ROWS=K_BLOCK, SAMPLED=SAMPLED, STEP=STEP, options={"num_warps": 2},
    )  # fmt: skip
    return found


def block_means(x, block):
    """Means of blocks of ``block`` tokens of x (B, H, T, D), any stride: float32 (B * H, blocks, D), as in pools()."""
    batch, heads, tokens, head_dim = x.shape
    blocks = block_count(tokens, block)
    means = torch.empty(batch * heads, blocks, head_dim, dtype=torch.float32, device=x.device)
    launch(
        _pools, (blocks, batch * heads), x, x, x, None, means, None, None, *x.stride(), *x.stride(), *x.stride(),
        heads, tokens, tokens, 0, blocks,
        D=head_dim, Q_ROWS=block, K_ROWS=block, SAMPLED=SAMPLED, STEP=STEP, options={"num_warps": 2},
    )  # fmt: skip
    return means


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
