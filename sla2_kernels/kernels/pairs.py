"""Numbers of 16 bit, two at a time, as one register of 32 bits holds them."""

import triton
import triton.language as tl

from .numerics import INTERPRETED

# added to a float16, this makes its last bit worth 1: the last byte of the sum is the INT8
HALF_BIAS = tl.constexpr(1536.0)
BIASED = tl.constexpr("{ .reg .b32 bias; mov.b32 bias, 0x66006600; fma.rn.f16x2 $0, $1, $2, bias; }")
WIDENED = tl.constexpr("shl.b32 $0, $2, 16;\nand.b32 $1, $2, 0xffff0000;")


@triton.jit
def half_biased(x, factor):
    """float16 x * factor + HALF_BIAS, rounded once; |x * factor| is at most 127."""
    if INTERPRETED:
        found = (x.to(tl.float32) * factor.to(tl.float32) + HALF_BIAS).to(tl.float16)
    else:
        found = tl.inline_asm_elementwise(BIASED, "=r,r,r", [x, factor], dtype=tl.float16, is_pure=True, pack=2)
    return found


@triton.jit
def bytes_of_halves(biased):
    """The last bytes, INT8."""
    if INTERPRETED:
        found = biased.to(tl.int16, bitcast=True).to(tl.int8)
    else:
        found = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x6420;", "=r,r,r", [biased], dtype=tl.int8, is_pure=True, pack=4
        )
    return found


@triton.jit
def widened(x):
    """x in float32. Of bfloat16 ptxas would take every second number in two instructions."""
    if INTERPRETED or x.dtype != tl.bfloat16:
        found = x.to(tl.float32)
    else:
        found = tl.inline_asm_elementwise(WIDENED, "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2)
    return found


@triton.jit
def in_pairs(x, dtype):
    """float32 x [rows, D] rounded to ``dtype``, two neighbours in an int32: [rows, D // 2]. Triton would keep each bfloat16 in a register
    of its own."""
    low, high = x.reshape([x.shape[0], x.shape[1] // 2, 2]).split()
    if INTERPRETED:
        low_bits = low.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        found = low_bits | (high.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    else:
        ROUNDED: tl.constexpr = "cvt.rn.bf16x2.f32" if dtype == tl.bfloat16 else "cvt.rn.f16x2.f32"
        found = tl.inline_asm_elementwise(
            ROUNDED + " $0, $2, $1;", "=r,r,r", [low, high], dtype=tl.int32, is_pure=True, pack=1
        )
    return found


@triton.jit
def of_pairs(pairs, dtype):
    """float32 [rows, D] of in_pairs()."""
    if dtype == tl.bfloat16:
        low = (pairs << 16).to(tl.float32, bitcast=True)
        high = (pairs & -65536).to(tl.float32, bitcast=True)
    else:
        low = pairs.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        high = (pairs >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return tl.join(low, high).reshape([pairs.shape[0], 2 * pairs.shape[1]])
