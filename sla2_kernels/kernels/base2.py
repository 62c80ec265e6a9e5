"""exp(x) is 2^(x log2 e): a power of two is what the cards have an instruction for."""

import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
