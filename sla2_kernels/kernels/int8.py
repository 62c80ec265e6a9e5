"""The float32 whose last mantissa bit is worth 1: a number added to it is rounded, and its bits hold the integer."""

import triton.language as tl

INT8_BIAS = tl.constexpr(12582912.0)
INT8_BIAS_BITS = tl.constexpr(0x4B400000)
