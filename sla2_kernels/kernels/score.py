"""Products of pooled tensors to float32 precision: the router's projections and its scores.

One program per TILE x TILE tile of A B^T. Each product is three TF32 ones, whatever torch's flags say: a single one would
change the selection, and float32 units are slower. Scores leave as integers of the same order: selecting is counting.
"""

import torch
import triton
import triton.language as tl

from ..router import block_count
from .launch import launch

TILE = 128
STEP = 32
LOWEST = tl.constexpr(-(2**31))


@triton.jit
def _ordered(x):
    """float32 -> int32 in the same order (-0.0 counts as 0.0)."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit(do_not_specialize=["b_heads", "b_stride_h", "rows", "cols"])
def _product(
    a, b, out, b_heads, b_stride_h, rows, cols, out_stride,
    D: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    j = tl.program_id(1) * TILE + tl.arange(0, TILE)
    bh = tl.program_id(2).to(tl.int64)
    a_rows = a + bh * rows * D + i[:, None] * D
    b_rows = b + bh % b_heads * b_stride_h + j[None, :] * D
    tile = tl.zeros([TILE, TILE], dtype=tl.float32)
    for start in range(0, D, STEP):
        d = start + tl.arange(0, STEP)
        left = tl.load(a_rows + d[None, :], mask=i[:, None] < rows, other=0.0)
        right = tl.load(b_rows + d[:, None], mask=j[None, :] < cols, other=0.0)
        tile = tl.dot(left, right, tile, input_precision="tf32x3")
    out_at = out + (bh * rows + i[:, None]) * out_stride + j[None, :]
    inside = (i[:, None] < rows) & (j[None, :] < out_stride)
    if ORDERED:
        tl.store(out_at, tl.where(j[None, :] < cols, _ordered(tile), LOWEST), mask=inside)
    else:
        tl.store(out_at, tile, mask=inside)


def _launch(plan, a, b, out, b_heads, b_stride_h, cols):
    batch_heads, rows, head_dim = a.shape
    grid = (block_count(rows, TILE), block_count(cols, TILE), batch_heads)
    launch(
        plan, _product, grid, a, b, out, b_heads, b_stride_h, rows, cols, out.shape[-1],
        D=head_dim, TILE=TILE, STEP=STEP, ORDERED=out.dtype == torch.int32, options={"num_warps": 8},
    )  # fmt: skip
    return out


def project(pooled, proj, plan=None):
    """x @ W^T of pooled (B * H, T, D) with W (D, D) or (H, D, D); None is the identity."""
    if proj is None:
        return pooled
    proj = proj.to(device=pooled.device, dtype=torch.float32).contiguous()
    heads = 1 if proj.dim() == 2 else proj.shape[0]
    return _launch(plan, pooled, proj, torch.empty_like(pooled), heads, proj.shape[-1] ** 2, proj.shape[-1])


def scores(q_pooled, k_pooled, plan=None):
    """Router scores of (B * H, T_m, D) and (B * H, T_n, D) as int32 (B * H, T_m, T_n padded to whole tiles).

    They order as the float32 scores do, up to a positive factor; the padding orders below all.
    """
    batch_heads, key_blocks, head_dim = k_pooled.shape
    width = block_count(key_blocks, TILE) * TILE
    out = torch.empty(batch_heads, q_pooled.shape[1], width, dtype=torch.int32, device=q_pooled.device)
    return _launch(plan, q_pooled, k_pooled, out, batch_heads, key_blocks * head_dim, key_blocks)
