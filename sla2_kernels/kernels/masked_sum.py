"""H_i and Z_i: the sums of h_j and z_j over the key blocks that query block i did not select, as one product
(1 - M_c) x [h | z] per head.

A dense product with a 0/1 matrix: exact, without subtraction, and at the same cost whatever the sparsity. Divided by the
number of key blocks so that float16 holds the sums; the factor cancels in O_l.

In INT8 the matrix holds each key block's power of two as well, in two bands (weighted_mask.py): the sums over the small blocks come
first, and shift down before those over the large ones are added.
"""

import triton
import triton.language as tl

from ..router import block_count
from .launch import launch
from .product_order import channel_at
from .weighted_mask import BAND_OCTAVES, BANDS, HALF_A_STEP


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


@triton.jit(do_not_specialize=["first_head", "rows", "blocks"])
def _int8_masked_sum(
    weights, scale, bands, sums, channel, out, out_stride, first_head, rows, blocks, width,
    D: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    # row tiles run fastest: neighbours share one panel of h, the large operand, in L2
    i = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    n = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    slot = tl.program_id(2).to(tl.int64)
    step = tl.arange(0, TILE_K)
    COLUMNS: tl.constexpr = D * D
    left_rows = weights + (slot * BANDS * rows + tl.minimum(i, rows - 1)[:, None]) * width
    right_at = sums + slot * blocks * COLUMNS + n[None, :]
    acc = tl.zeros([TILE_M, TILE_N], dtype=tl.int32)
    for band in range(tl.load(bands + slot), 0, -1):
        acc = (acc + HALF_A_STEP) >> BAND_OCTAVES
        left_at = left_rows + (band - 1) * rows * width
        # the maximum tells ptxas that the loop runs, as in int8_attention.py; of a single product a turn Triton carries the
        # right operand over in registers, byte by byte
        for start in range(0, tl.maximum(blocks, 1), 2 * TILE_K):
            first, second = start + step, start + TILE_K + step
            # the weights are zero from the last block on, up to ``width``
            left = tl.load(left_at + first[None, :])  # [TILE_M, TILE_K]
            right = tl.load(
                right_at + tl.minimum(first, blocks - 1)[:, None].to(tl.int64) * COLUMNS
            )  # [TILE_K, TILE_N]
            acc = tl.dot(left, right, acc=acc, out_dtype=tl.int32)
            left = tl.load(left_at + second[None, :])
            right = tl.load(right_at + tl.minimum(second, blocks - 1)[:, None].to(tl.int64) * COLUMNS)
            acc = tl.dot(left, right, acc=acc, out_dtype=tl.int32)
    channels = tl.load(channel + (first_head + slot) * D + channel_at(n % D, D)) * tl.load(scale + slot)
    out_at = out + (slot * rows + i[:, None]) * out_stride + n[None, :]
    value = (acc.to(tl.float32) * channels[None, :]).to(out.dtype.element_ty)
    tl.store(out_at, value, mask=i[:, None] < rows)


def int8_masked_sum(work, v_channel, group, config):
    """H_i of work.query_sums for the heads of slice ``group``, from work.sums in INT8 and work.weights.

    v_channel: as in Pools; h_j's columns are over it, in the order of channel_at(), in which H_i's columns stay.
    """
    rows, head_dim = work.query_sums.shape[1], work.norms.shape[2]
    blocks, columns = work.sums.shape[1:]
    launch(
        _int8_masked_sum, (block_count(rows, config.tile_m), columns // config.tile_n, group.stop - group.start),
        work.weights, work.weights_scale, work.bands, work.sums, v_channel, work.query_sums, work.query_sums.stride(1),
        group.start, rows, blocks, work.weights.shape[3], D=head_dim,
        TILE_M=config.tile_m, TILE_N=config.tile_n, TILE_K=config.tile_k, options=config.options,
    )  # fmt: skip
