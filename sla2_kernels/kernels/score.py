"""Products of pooled tensors to float32 precision: the router's projections and its scores.

One program per TILE x TILE tile of A B^T. Each product is three TF32 ones, whatever torch's flags say: a single one would
change the selection, and float32 units are slower. Scores leave as integers of the same order: selecting is counting.
"""

import torch
import triton
import triton.language as tl

from ..router import K_BLOCK, Q_BLOCK, block_count
from .launch import launch

TILE = 64
SCORES_STEP = 128  # a row of scores is a multiple of it long, so that the top-k reads without asking where it ends
LOWEST = tl.constexpr(-(2**31))
HIGHEST = tl.constexpr(2**31 - 1)


@triton.jit
def ordered(x):
    """float32 -> int32 in the same order (-0.0 counts as 0.0)."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def unordered(bits):
    """The float32 that ordered() makes these int32 of."""
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["b_heads", "b_stride_h", "rows", "cols", "diagonal"])
def _product(
    a, b, out, b_heads, b_stride_h, rows, cols, out_stride, diagonal,
    D: tl.constexpr, TILE: tl.constexpr, ORDERED: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK_LOG2: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    j = tl.program_id(1) * TILE + tl.arange(0, TILE)
    bh = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, D)
    left = tl.load(a + bh * rows * D + i[:, None] * D + d[None, :], mask=i[:, None] < rows, other=0.0)
    right_at = b + bh % b_heads * b_stride_h + j[None, :] * D + d[:, None]
    right = tl.load(right_at, mask=j[None, :] < cols, other=0.0)
    # in steps along D, which take less memory, the same product takes three times as long
    tile = tl.dot(left, right, input_precision="tf32x3")
    out_at = out + (bh * rows + i[:, None]) * out_stride + j[None, :]
    inside = (i[:, None] < rows) & (j[None, :] < out_stride)
    if ORDERED:
        # a shift rounds down below zero too, where the first queries' own keys lie before these
        own_begin = (diagonal + i * Q_BLOCK) >> K_BLOCK_LOG2
        own_end = (diagonal + (i + 1) * Q_BLOCK - 1) >> K_BLOCK_LOG2
        own = (j[None, :] >= own_begin[:, None]) & (j[None, :] <= own_end[:, None])
        raised = tl.where(own, HIGHEST, ordered(tile))
        tl.store(out_at, tl.where(j[None, :] < cols, raised, LOWEST), mask=inside)
    else:
        tl.store(out_at, tile, mask=inside)


def _launch(plan, a, b, out, b_heads, b_stride_h, cols, diagonal=0):
    batch_heads, rows, head_dim = a.shape
    grid = (block_count(rows, TILE), block_count(out.shape[-1], TILE), batch_heads)
    launch(
        plan, _product, grid, a, b, out, b_heads, b_stride_h, rows, cols, out.shape[-1], diagonal,
        D=head_dim, TILE=TILE, ORDERED=out.dtype == torch.int32,
        Q_BLOCK=Q_BLOCK, K_BLOCK_LOG2=K_BLOCK.bit_length() - 1, options={"num_warps": 4},
    )  # fmt: skip
    return out


def project(pooled, proj, plan=None):
    """x @ W^T of pooled (B * H, T, D) with W (D, D) or (H, D, D), float32 and contiguous; None is the identity."""
    if proj is None:
        return pooled
    heads = 1 if proj.dim() == 2 else proj.shape[0]
    return _launch(plan, pooled, proj, torch.empty_like(pooled), heads, proj.shape[-1] ** 2, proj.shape[-1])


def scores(q_pooled, k_pooled, plan=None, diagonal=None):
    """Router scores of (B * H, T_m, D) and (B * H, T_n, D) as int32 (B * H, T_m, T_n padded to whole SCORES_STEPs).

    They order as the float32 scores do, up to a positive factor; the padding orders below all. diagonal: the place among
    the keys of the first query's own key, whose blocks then order above all; None leaves the scores alone.
    """
    batch_heads, key_blocks, head_dim = k_pooled.shape
    width = block_count(key_blocks, SCORES_STEP) * SCORES_STEP
    out = torch.empty(batch_heads, q_pooled.shape[1], width, dtype=torch.int32, device=q_pooled.device)
    nowhere = width * K_BLOCK
    own = nowhere if diagonal is None else diagonal
    return _launch(plan, q_pooled, k_pooled, out, batch_heads, key_blocks * head_dim, key_blocks, own)
