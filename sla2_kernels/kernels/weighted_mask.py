"""The factors of h_j where it is in 8 bit, the 0/1 mask 1 - M_c times each key block's power of two; and Z_i.

In 8 bit h_j is over a power of two per key block, which the mask gives back, relative to the head's largest. FP8
(hopper_masked_sum.py): the largest counts as 2^8, and blocks down to 2^-17 of it count at all. INT8 (mma_masked_sum.py): a
weight has seven octaves, so there are two bands of weights, the second for the blocks 2^-7 to 2^-13 of the largest; most
heads need the first alone. z_j is in 16 bit: Z_i, its masked sum, is taken here.
One program per (TILE or INT8_TILE query blocks, head).
"""

import triton
import triton.language as tl

from ..router import block_count
from .launch import launch

TILE, STEP = 64, 128
# a program does little but wait for memory: many small ones take half the time of a few, and the cards have less shared memory
INT8_TILE, INT8_STEP = 16, 64
EXPONENTS = 1024  # read at a time
LARGEST_WEIGHT_LOG2 = tl.constexpr(8.0)  # 2^8 is E4M3's largest power of two
INT8_LARGEST_LOG2 = tl.constexpr(6.0)  # 2^6 is INT8's
BANDS = tl.constexpr(2)
BAND_OCTAVES = tl.constexpr(7)  # of an INT8 weight: 2^0 to 2^6
HALF_A_STEP = tl.constexpr(2**6)  # of the first band, in the sums over the second
NO_EXPONENT = tl.constexpr(-1.0e30)  # of a block that is not there: its weight is 0


@triton.jit
def _largest_exponent(exponents, blocks, EXPONENTS: tl.constexpr):
    highest = tl.full([EXPONENTS], NO_EXPONENT, dtype=tl.float32)
    for start in range(0, blocks, EXPONENTS):
        block = start + tl.arange(0, EXPONENTS)
        highest = tl.maximum(highest, tl.load(exponents + block, mask=block < blocks, other=NO_EXPONENT))
    return tl.max(highest, axis=0)


@triton.jit
def _in_register_order(weight):
    """[rows, blocks] with bits 3 2 1 0 of a key block's number as 2 1 3 0: where the Gluon products' registers have it."""
    ROWS: tl.constexpr = weight.shape[0]
    BLOCKS: tl.constexpr = weight.shape[1]
    return weight.reshape([ROWS, BLOCKS // 16, 2, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([ROWS, BLOCKS])


@triton.jit(do_not_specialize=["first_head", "rows", "blocks"])
def _weighted_mask(
    mask, exponents, norms, weights, scale, out, mask_stride_h, mask_stride_m, first_head, rows, blocks,
    WIDTH: tl.constexpr, OUT_STRIDE: tl.constexpr, D: tl.constexpr,
    TILE: tl.constexpr, STEP: tl.constexpr, EXPONENTS: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(1).to(tl.int64)
    i, d = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.arange(0, D)
    valid = i[:, None] < rows
    exponents += slot * blocks
    norms += slot * blocks * D
    mask_rows = mask + (first_head + slot) * mask_stride_h + i[:, None].to(tl.int64) * mask_stride_m
    weight_rows = weights + (slot * rows + i[:, None]) * WIDTH
    largest = _largest_exponent(exponents, blocks, EXPONENTS)

    acc = tl.zeros([TILE, D], dtype=tl.float32)
    for start in range(0, blocks, STEP):
        j = start + tl.arange(0, STEP)
        inside = j < blocks
        ones = tl.load(mask_rows + j[None, :], mask=valid, other=0.0)  # [TILE, STEP], zero past the last block
        z = tl.load(norms + j[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)  # [STEP, D]
        acc = tl.dot(ones, z, acc, input_precision="tf32x3")
        power = tl.load(exponents + j, mask=inside, other=NO_EXPONENT) - largest + LARGEST_WEIGHT_LOG2
        weight = (ones.to(tl.float32) * tl.exp2(power)[None, :]).to(weights.dtype.element_ty)
        tl.store(weight_rows + j[None, :], _in_register_order(weight), mask=valid)
    out_at = out + (slot * rows + i[:, None]) * OUT_STRIDE + d[None, :]
    tl.store(out_at, (acc / blocks).to(out.dtype.element_ty), mask=valid)
    if tl.program_id(0) == 0:
        tl.store(scale + slot, tl.exp2(largest - LARGEST_WEIGHT_LOG2) / blocks)


@triton.jit
def _int8_weight(ones, power, REGISTER_ORDER: tl.constexpr):
    """A band of weights in INT8 [rows, blocks]: powers below 2^0 are cut off; a quarter more, should one be a little less."""
    weight = (ones.to(tl.float32) * tl.exp2(power)[None, :] + 0.25).to(tl.int8)
    if REGISTER_ORDER:
        weight = _in_register_order(weight)
    return weight


@triton.jit(do_not_specialize=["first_head", "rows", "blocks"])
def _int8_weighted_mask(
    mask, exponents, norms, weights, scale, bands, out, mask_stride_h, mask_stride_m, first_head, rows, blocks, width, out_stride,
    D: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, EXPONENTS: tl.constexpr, REGISTER_ORDER: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(1).to(tl.int64)
    i, d = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.arange(0, D)
    valid = i[:, None] < rows
    exponents += slot * blocks
    norms += slot * blocks * D
    mask_rows = mask + (first_head + slot) * mask_stride_h + i[:, None].to(tl.int64) * mask_stride_m
    weight_rows = weights + (slot * BANDS * rows + i[:, None]) * width
    largest = _largest_exponent(exponents, blocks, EXPONENTS)
    # blocks too small for either band do not count
    needed = tl.full([EXPONENTS], 1, dtype=tl.int32)
    for start in range(0, blocks, EXPONENTS):
        block = start + tl.arange(0, EXPONENTS)
        below = largest - tl.load(exponents + block, mask=block < blocks, other=NO_EXPONENT)
        needed = tl.where((below >= BAND_OCTAVES) & (below < BANDS * BAND_OCTAVES), 2, needed)
    bands_needed = tl.max(needed, axis=0)

    acc = tl.zeros([TILE, D], dtype=tl.float32)
    # to the end of the rows: a product walks them in whole steps
    for start in range(0, width, STEP):
        j = start + tl.arange(0, STEP)
        inside = j < blocks
        ones = tl.load(mask_rows + j[None, :], mask=valid, other=0.0)  # [TILE, STEP], zero past the last block
        z = tl.load(norms + j[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)  # [STEP, D]
        acc = tl.dot(ones, z, acc, input_precision="tf32x3")
        power = tl.load(exponents + j, mask=inside, other=NO_EXPONENT) - largest + INT8_LARGEST_LOG2
        tl.store(weight_rows + j[None, :], _int8_weight(ones, power, REGISTER_ORDER), mask=valid)
        if bands_needed == 2:
            lower = tl.where(power < 0, power + BAND_OCTAVES, NO_EXPONENT)
            tl.store(weight_rows + rows * width + j[None, :], _int8_weight(ones, lower, REGISTER_ORDER), mask=valid)
    out_at = out + (slot * rows + i[:, None]) * out_stride + d[None, :]
    tl.store(out_at, (acc / blocks).to(out.dtype.element_ty), mask=valid)
    if tl.program_id(0) == 0:
        tl.store(scale + slot, tl.exp2(largest - INT8_LARGEST_LOG2) / blocks)
        tl.store(bands + slot, bands_needed)


def int8_weighted_mask(unselected, work, group, *, register_order):
    """Fills work.weights in INT8, work.weights_scale, work.bands and work.query_norms for the heads of slice ``group``.

    unselected: as in weighted_mask(). register_order: what mma_masked_sum.py wants.
    """
    rows, blocks = unselected.shape[1:]
    launch(
        _int8_weighted_mask, (block_count(rows, INT8_TILE), group.stop - group.start),
        unselected, work.sums_exponent, work.norms, work.weights, work.weights_scale, work.bands, work.query_norms,
        unselected.stride(0), unselected.stride(1), group.start, rows, blocks, work.weights.shape[3], work.query_norms.stride(1),
        D=work.norms.shape[2], TILE=INT8_TILE, STEP=INT8_STEP, EXPONENTS=EXPONENTS, REGISTER_ORDER=register_order,
        options={"num_warps": 4, "num_stages": 3},
    )  # fmt: skip


def weighted_mask(unselected, work, group):
    """Fills work.weights, work.weights_scale and work.query_norms for the heads of slice ``group``.

    unselected: (B * H, T_m, T_n), rows with zeros up to the width of work.weights.
    """
    rows, blocks = unselected.shape[1:]
    launch(
        _weighted_mask, (block_count(rows, TILE), group.stop - group.start),
        unselected, work.sums_exponent, work.norms, work.weights, work.weights_scale, work.query_norms,
        unselected.stride(0), unselected.stride(1), group.start, rows, blocks,
        WIDTH=work.weights.shape[2], OUT_STRIDE=work.query_norms.stride(1), D=work.norms.shape[2],
        TILE=TILE, STEP=STEP, EXPONENTS=EXPONENTS, options={"num_warps": 8, "num_stages": 3},
    )  # fmt: skip
