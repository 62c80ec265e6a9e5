"""H_i and Z_i: the sums of h_j and z_j over the key blocks that query block i did not select, as one product
(1 - M_c) x [h | z] per head.

A dense product with a 0/1 matrix: exact, without subtraction, and at the same cost whatever the sparsity. Divided by the
number of key blocks so that float16 holds the sums; the factor cancels in O_l.
"""

import triton
import triton.language as tl

from ..router import block_count
from .launch import launch


@triton.jit(do_not_specialize=["first_head", "rows", "blocks"])
def _masked_sum(
    mask, sums, out, mask_stride_h, mask_stride_m, first_head, rows, blocks,
    COLUMNS: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    # row tiles run fastest: neighbours share one panel of h, the large operand, in L2
    i = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    n = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    slot = tl.program_id(2).to(tl.int64)
    step = tl.arange(0, TILE_K)
    mask_rows = mask + (first_head + slot) * mask_stride_h + i[:, None].to(tl.int64) * mask_stride_m
    sums += slot * blocks * COLUMNS
    acc = tl.zeros([TILE_M, TILE_N], dtype=tl.float32)
    for start in range(0, blocks, TILE_K):
        j = start + step
        inside = j < blocks
        # [TILE_M, TILE_K]; the mask has zeros past its last block
        left = tl.load(mask_rows + j[None, :], mask=i[:, None] < rows, other=0.0)
        right_at = sums + j[:, None].to(tl.int64) * COLUMNS + n[None, :]
        right = tl.load(right_at, mask=inside[:, None] & (n[None, :] < COLUMNS), other=0.0)  # [TILE_K, TILE_N]
        acc = tl.dot(left, right, acc, input_precision="tf32x3")
    out_at = out + (slot * rows + i[:, None]) * COLUMNS + n[None, :]
    value = (acc / blocks).to(out.dtype.element_ty)
    tl.store(out_at, value, mask=(i[:, None] < rows) & (n[None, :] < COLUMNS))


def masked_sum(unselected, sums, out, group, config):
    """out[g] = unselected[first + g] @ sums[g] / T_n; (B * H, T_m, T_n) x (G, T_n, F) -> (G, T_m, F)."""
    rows, blocks = unselected.shape[1:]
    columns, slots = out.shape[-1], group.stop - group.start
    launch(
        _masked_sum, (block_count(rows, config.tile_m), block_count(columns, config.tile_n), slots),
        unselected, sums, out, unselected.stride(0), unselected.stride(1), group.start, rows, blocks,
        COLUMNS=columns, TILE_M=config.tile_m, TILE_N=config.tile_n, TILE_K=config.tile_k, options=config.options,
    )  # fmt: skip
