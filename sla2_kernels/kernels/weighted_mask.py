"""What the masked sums in 8 bit multiply h_j with, the 0/1 mask 1 - M_c times each key block's power of two; and Z_i.

In 8 bit h_j is over a power of two per key block, which the mask gives back, relative to the head's largest. FP8
(hopper_masked_sum.py): the largest counts as 2^8, and blocks down to 2^-17 of it count at all. INT8 (masked_sum.py): a weight
has seven octaves, so there are two bands of weights, the second for the blocks 2^-7 to 2^-13 of the largest; most heads
need the first alone. z_j is in 16 bit: Z_i, its masked sum, is taken here.
One program per (some query blocks, head).
"""

import triton
import triton.language as tl

from ..router import block_count
from .launch import launch

# query blocks of a program, key blocks at a time, warps; cards with mma.sync have less shared memory
FP8_SIZES, INT8_SIZES = (64, 128, 8), (64, 64, 8)
EXPONENTS = 1024  # read at a time
FP8_LARGEST_LOG2 = tl.constexpr(8.0)  # 2^8 is E4M3's largest power of two
INT8_LARGEST_LOG2 = tl.constexpr(6.0)  # 2^6 is INT8's
BANDS = tl.constexpr(2)
BAND_OCTAVES = tl.constexpr(7)  # of an INT8 weight: 2^0 to 2^6
HALF_A_STEP = tl.constexpr(2**6)  # of the first band, in the sums over the second
NO_EXPONENT = tl.constexpr(-1.0e30)  # of a block that is not there: its weight is 0


@triton.jit
def _largest_and_least(exponents, blocks, EXPONENTS: tl.constexpr):
    """The largest exponent of a head, and the least that two bands of INT8 weights hold."""
    highest = tl.full([EXPONENTS], NO_EXPONENT, dtype=tl.float32)
    for start in range(0, blocks, EXPONENTS):
        block = start + tl.arange(0, EXPONENTS)
        highest = tl.maximum(highest, tl.load(exponents + block, mask=block < blocks, other=NO_EXPONENT))
    largest = tl.max(highest, axis=0)
    lowest = tl.full([EXPONENTS], 0.0, dtype=tl.float32) + largest
    for start in range(0, blocks, EXPONENTS):
        block = start + tl.arange(0, EXPONENTS)
        exponent = tl.load(exponents + block, mask=block < blocks, other=NO_EXPONENT)
        lowest = tl.minimum(lowest, tl.where(exponent > largest - BANDS * BAND_OCTAVES, exponent, largest))
    return largest, tl.min(lowest, axis=0)


@triton.jit
def _ordered(weight, REGISTER_ORDER: tl.constexpr):
    """Weights [rows, blocks] where along_key_blocks.py has their blocks: bits 3 2 1 0 of a block's number become 2 1 3 0."""
    ROWS: tl.constexpr = weight.shape[0]
    BLOCKS: tl.constexpr = weight.shape[1]
    if REGISTER_ORDER:
        weight = weight.reshape([ROWS, BLOCKS // 16, 2, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([ROWS, BLOCKS])
    return weight


@triton.jit(do_not_specialize=["first_head", "rows", "blocks"])
def _weighted_mask(
    mask, exponents, norms, weights, scale, bands, out, mask_stride_h, mask_stride_m, first_head, rows, blocks,
    WIDTH: tl.constexpr, OUT_STRIDE: tl.constexpr, D: tl.constexpr,
    TILE: tl.constexpr, STEP: tl.constexpr, EXPONENTS: tl.constexpr, REGISTER_ORDER: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(1).to(tl.int64)
    i, d = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.arange(0, D)
    valid = i[:, None] < rows
    exponents += slot * blocks
    norms += slot * blocks * D
    mask_rows = mask + (first_head + slot) * mask_stride_h + i[:, None].to(tl.int64) * mask_stride_m
    INT8: tl.constexpr = bands is not None
    LARGEST_LOG2: tl.constexpr = INT8_LARGEST_LOG2 if INT8 else FP8_LARGEST_LOG2
    PLANES: tl.constexpr = BANDS if INT8 else 1
    weight_rows = weights + (slot * PLANES * rows + i[:, None]) * WIDTH
    largest, least = _largest_and_least(exponents, blocks, EXPONENTS)
    bands_needed = tl.where(least > largest - BAND_OCTAVES, 1, 2)

    acc = tl.zeros([TILE, D], dtype=tl.float32)
    for start in range(0, WIDTH, STEP):
        j = start + tl.arange(0, STEP)
        inside = j < blocks
        ones = tl.load(mask_rows + j[None, :], mask=valid, other=0.0)  # [TILE, STEP], zero past the last block
        z = tl.load(norms + j[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)  # [STEP, D]
        acc = tl.dot(ones, z, acc, input_precision="tf32x3")
        power = tl.load(exponents + j, mask=inside, other=NO_EXPONENT) - largest + LARGEST_LOG2
        wide = ones.to(tl.float32)
        weight = wide * tl.exp2(power)[None, :]
        if INT8:
            # what lies below 1 is cut off, and counts in the other band; a quarter more, should a power be a little less
            weight = _ordered((weight + 0.25).to(tl.int8), REGISTER_ORDER)
            tl.store(weight_rows + j[None, :], weight, mask=valid)
            if bands_needed == 2:
                other = wide * tl.where(power < 0, tl.exp2(power + BAND_OCTAVES), 0.0)[None, :]
                other = _ordered((other + 0.25).to(tl.int8), REGISTER_ORDER)
                tl.store(weight_rows + rows * WIDTH + j[None, :], other, mask=valid)
        else:
            weight = _ordered(weight.to(weights.dtype.element_ty), REGISTER_ORDER)
            tl.store(weight_rows + j[None, :], weight, mask=valid)
    out_at = out + (slot * rows + i[:, None]) * OUT_STRIDE + d[None, :]
    tl.store(out_at, (acc / blocks).to(out.dtype.element_ty), mask=valid)
    if tl.program_id(0) == 0:
        tl.store(scale + slot, tl.exp2(largest - LARGEST_LOG2) / blocks)
        if INT8:
            tl.store(bands + slot, bands_needed)


def weighted_mask(unselected, work, group, *, register_order):
    """Fills work.weights, work.weights_scale, in INT8 work.bands, and work.query_norms for the heads of slice ``group``.

    unselected: (B * H, T_m, T_n), rows with zeros up to the width of work.weights. register_order: what the masked sums in
    Gluon want.
    """
    rows, blocks = unselected.shape[1:]
    tile, step, warps = FP8_SIZES if work.bands is None else INT8_SIZES
    launch(
        _weighted_mask, (block_count(rows, tile), group.stop - group.start),
        unselected, work.sums_exponent, work.norms, work.weights, work.weights_scale, work.bands, work.query_norms,
        unselected.stride(0), unselected.stride(1), group.start, rows, blocks,
        WIDTH=work.weights.shape[-1], OUT_STRIDE=work.query_norms.stride(1), D=work.norms.shape[2],
        TILE=tile, STEP=step, EXPONENTS=EXPONENTS, REGISTER_ORDER=register_order,
        options={"num_warps": warps, "num_stages": 3},
    )  # fmt: skip
