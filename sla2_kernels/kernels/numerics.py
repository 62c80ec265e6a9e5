"""Numbers and number formats that several kernels share."""

import triton
import triton.language as tl

from .. import router
from ..support import interpreting

# exp(x) = 2^(x log2 e): GPUs have an instruction for powers of two only.
LOG2_E = tl.constexpr(1.4426950408889634)

# The score of a key that does not count, and a running maximum before the first key: below every real score, and finite,
# because the difference of two infinities would be NaN.
NO_SCORE = tl.constexpr(-1.0e30)

# Below this phi(Q) Z_i the linear branch has no output, and the ratio becomes 1.
MIN_LINEAR_WEIGHT = tl.constexpr(router.MIN_LINEAR_WEIGHT)

# The float32 whose last mantissa bit is worth 1: adding it to a number rounds that number to an integer, which the low
# bits of the sum then hold.
INT8_BIAS = tl.constexpr(12582912.0)
INT8_BIAS_BITS = tl.constexpr(0x4B400000)
INT8_MAX = tl.constexpr(127.0)

FLOAT32_ONE = tl.constexpr(127 << 23)  # its bits

FP8_MAX = tl.constexpr(448.0)  # of E4M3
FP8_MIN_NORMAL = tl.constexpr(2.0**-6)
FP8_SUBNORMAL_STEPS = tl.constexpr(1.5 * 2.0**14)  # float32 numbers of this size are 2^-9 apart, E4M3's smallest step
P_LOG2_RANGE = tl.constexpr(8.0)  # P lies in [0, 1]; times 2^8 it uses E4M3's range and stays below 448
MIN_EXPONENT = tl.constexpr(-60.0)  # of an all-zero block: far below real ones, and 2^60 still fits float32
MIN_MAGNITUDE = tl.constexpr(1e-20)  # of a block's largest element, so that an all-zero block divides by no zero

# Triton's interpreter truncates where every GPU rounds, so on the CPU to_fp8() rounds itself.
INTERPRETED = tl.constexpr(interpreting())


@triton.jit
def _add(x, y):
    return x + y


@triton.jit
def _larger_or_nan(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def add_up(x, AXIS: tl.constexpr):
    """Sums along an axis in x's dtype."""
    if INTERPRETED:
        # tl.reduce calls Python for every number there
        found = tl.sum(x, axis=AXIS)
    else:
        found = tl.reduce(x, AXIS, _add)
    return found


@triton.jit
def largest_or_nan(x, AXIS: tl.constexpr):
    """The largest along an axis, or NaN where one is."""
    if INTERPRETED:
        # tl.max leaves NaN out there
        found = tl.max(x, axis=AXIS) + tl.sum(tl.where(x == x, 0.0, x), axis=AXIS).to(x.dtype)
    else:
        found = tl.reduce(x, AXIS, _larger_or_nan)
    return found


@triton.jit
def to_fp8(x):
    """float32 within +-448 -> E4M3 (float8e4nv), to the nearest, ties to even."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        kept = (bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF
        subnormal = (x + FP8_SUBNORMAL_STEPS) - FP8_SUBNORMAL_STEPS
        x = tl.where(tl.abs(x) < FP8_MIN_NORMAL, subnormal, kept.to(tl.float32, bitcast=True))
    return x.to(tl.float8e4nv)


@triton.jit
def fp8_exponent(largest):
    """Exponent of the smallest power of two that brings magnitudes up to ``largest`` into E4M3's range."""
    return tl.maximum(tl.ceil(tl.log2(tl.maximum(largest, 1e-30) / FP8_MAX)), MIN_EXPONENT)


@triton.jit
def is_finite(x):
    return x - x == 0


@triton.jit
def ordered_int(x):
    """float32 -> int32 in the same order (-0.0 counts as 0.0)."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    # two's complement counts down where float32's sign and magnitude count up
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_ordered_int(bits):
    """The inverse of ordered_int()."""
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def phi_numerator(x, axis: tl.constexpr):
    """softmax(x) over the features without its denominator, which cancels wherever phi(Q) stands above and below."""
    largest = tl.max(x, axis=axis)
    return tl.exp(x - (largest if axis == 0 else largest[:, None]))


@triton.jit
def softmax_step(scores, row_max):
    """One step of the online softmax over [rows, keys] scores that are log2 already.

    Returns P below the new running maximum, the factor that brings earlier sums to it, and that maximum.
    """
    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    return tl.exp2(scores - new_max[:, None]), tl.exp2(row_max - new_max), new_max
