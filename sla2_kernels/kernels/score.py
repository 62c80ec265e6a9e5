"""Products of pooled tensors to float32 precision: the router's projections and its scores.

One program per 64 x 64 tile of A B^T. Each product is three TF32 ones, whatever torch's flags say: a single one would
change the selection, and float32 units are slower.
"""

import torch
import triton
import triton.language as tl

TILE = 64
STEP = 32


@triton.jit(do_not_specialize=["b_heads", "b_stride_h", "rows", "cols"])
def _product(
    a, b, out, b_heads, b_stride_h, rows, cols, D: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr
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
    inside = (i[:, None] < rows) & (j[None, :] < cols)
    tl.store(out + (bh * rows + i[:, None]) * cols + j[None, :], tile, mask=inside)


def _launch(a, b, b_heads, b_stride_h, cols):
    batch_heads, rows, head_dim = a.shape
    out = torch.empty(batch_heads, rows, cols, dtype=torch.float32, device=a.device)
    grid = (triton.cdiv(rows, TILE), triton.cdiv(cols, TILE), batch_heads)
    _product[grid](a, b, out, b_heads, b_stride_h, rows, cols, D=head_dim, TILE=TILE, STEP=STEP, num_warps=4)
    return out


def project(pooled, proj):
    """x @ W^T of pooled (B * H, T, D) with W (D, D) or (H, D, D); None is the identity."""
    if proj is None:
        return pooled
    proj = proj.to(device=pooled.device, dtype=torch.float32).contiguous()
    heads = 1 if proj.dim() == 2 else proj.shape[0]
    return _launch(pooled, proj, heads, proj.shape[-1] ** 2, proj.shape[-1])


def scores(q_pooled, k_pooled):
    """Router scores up to a positive factor: (B * H, T_m, D), (B * H, T_n, D) -> float32 (B * H, T_m, T_n)."""
    batch_heads, key_blocks, head_dim = k_pooled.shape
    return _launch(q_pooled, k_pooled, batch_heads, key_blocks * head_dim, key_blocks)
