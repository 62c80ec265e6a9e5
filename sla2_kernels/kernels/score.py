"""Products of pooled tensors to float32 precision: the router's projections and its scores.

One program per TILE x TILE tile of A B^T. Each product is three TF32 ones, whatever torch's flags say: one TF32 product
would change the selection, and float32 units are slower. Scores leave as integers in the same order, because the top-k
(select.py) finds its threshold by counting.
"""

import torch
import triton
import triton.language as tl

from ..router import K_BLOCK, block_count
from .launch import launch
from .numerics import ordered_int
from .tiles import QUERY_BLOCK

TILE = 64
SCORES_STEP = 128  # the length of a row of scores is a multiple of it, so that the top-k reads without masks
INT32_MIN = tl.constexpr(-(2**31))  # the padding, and below every score
INT32_MAX = tl.constexpr(2**31 - 1)  # a query's own key blocks, above every score
KEY_BLOCK_LOG2 = tl.constexpr(K_BLOCK.bit_length() - 1)


@triton.jit(do_not_specialize=["b_heads", "b_stride_h", "rows", "cols", "diagonal"])
def _product(
    a, b, out, b_heads, b_stride_h, rows, cols, out_stride, diagonal,
    D: tl.constexpr, TILE: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    j = tl.program_id(1) * TILE + tl.arange(0, TILE)
    bh = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, D)
    left = tl.load(a + bh * rows * D + i[:, None] * D + d[None, :], mask=i[:, None] < rows, other=0.0)  # [TILE, D]
    right_at = b + bh % b_heads * b_stride_h + j[None, :] * D + d[:, None]
    right = tl.load(right_at, mask=j[None, :] < cols, other=0.0)  # [D, TILE]
    # in steps along D, which need less shared memory, the same product takes three times as long
    tile = tl.dot(left, right, input_precision="tf32x3")  # [TILE, TILE]
    out_at = out + (bh * rows + i[:, None]) * out_stride + j[None, :]
    inside = (i[:, None] < rows) & (j[None, :] < out_stride)
    if ORDERED:
        # a shift, unlike a division, rounds down below zero too: the first queries' own keys may lie before these keys
        own_begin = (diagonal + i * QUERY_BLOCK) >> KEY_BLOCK_LOG2
        own_end = (diagonal + (i + 1) * QUERY_BLOCK - 1) >> KEY_BLOCK_LOG2
        own = (j[None, :] >= own_begin[:, None]) & (j[None, :] <= own_end[:, None])
        raised = tl.where(own, INT32_MAX, ordered_int(tile))
        tl.store(out_at, tl.where(j[None, :] < cols, raised, INT32_MIN), mask=inside)
    else:
        tl.store(out_at, tile, mask=inside)


def _launch(a, b, out, b_heads, b_stride_h, cols, diagonal=0):
    batch_heads, rows, head_dim = a.shape
    grid = (block_count(rows, TILE), block_count(out.shape[-1], TILE), batch_heads)
    launch(
        _product, grid, a, b, out, b_heads, b_stride_h, rows, cols, out.shape[-1], diagonal,
        D=head_dim, TILE=TILE, ORDERED=out.dtype == torch.int32, options={"num_warps": 4},
    )  # fmt: skip
    return out


def project(pooled, proj):
    """x @ W^T of pooled (B * H, T, D) with W (D, D) or (H, D, D), float32 and contiguous; None is the identity."""
    if proj is None:
        return pooled
    heads = 1 if proj.dim() == 2 else proj.shape[0]
    return _launch(pooled, proj, torch.empty_like(pooled), heads, proj.shape[-1] ** 2, proj.shape[-1])


def scores(q_pooled, k_pooled, diagonal=None):
    """Router scores of (B * H, T_m, D) and (B * H, T_n, D) as int32 (B * H, T_m, T_n padded to whole SCORES_STEPs).

    They are in the order of the float32 scores, up to a positive factor, and the padding is below all. diagonal: which key
    is the first query's own; each query's own key blocks then are above all. None leaves the scores alone.
    """
    batch_heads, key_blocks, head_dim = k_pooled.shape
    width = block_count(key_blocks, SCORES_STEP) * SCORES_STEP
    out = torch.empty(batch_heads, q_pooled.shape[1], width, dtype=torch.int32, device=q_pooled.device)
    nowhere = width * K_BLOCK
    own = nowhere if diagonal is None else diagonal
    return _launch(q_pooled, k_pooled, out, batch_heads, key_blocks * head_dim, key_blocks, own)
