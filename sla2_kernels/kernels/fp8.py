"""float32 -> FP8 E4M3, to the nearest, ties to even."""

import os

import triton
import triton.language as tl

# Triton's interpreter cuts the mantissa off where every card rounds: on CPU the rounding is done here.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
SMALLEST_NORMAL = tl.constexpr(2.0**-6)
TO_SUBNORMAL_STEPS = tl.constexpr(1.5 * 2.0**14)  # a float32 of this size has steps of 2 ** -9, E4M3's smallest


@triton.jit
def to_fp8(x):
    """float32 within +-448 -> float8e4nv."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        kept = (bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF
        subnormal = (x + TO_SUBNORMAL_STEPS) - TO_SUBNORMAL_STEPS
        x = tl.where(tl.abs(x) < SMALLEST_NORMAL, subnormal, kept.to(tl.float32, bitcast=True))
    return x.to(tl.float8e4nv)
