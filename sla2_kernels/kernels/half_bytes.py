"""float16 to INT8, two numbers at a time: added to the float16 whose last bit is worth 1, a number's last byte is the INT8."""

import triton
import triton.language as tl

from .numerics import INTERPRETED

HALF_BIAS = tl.constexpr(1536.0)
BIASED = tl.constexpr("{ .reg .b32 bias; mov.b32 bias, 0x66006600; fma.rn.f16x2 $0, $1, $2, bias; }")


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
