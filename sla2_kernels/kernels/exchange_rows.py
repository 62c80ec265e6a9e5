"""Rows of q, k and v to INT8 with one scale each, for the exchange between GPUs, and back; see eight_bit_exchange.py.

_encode: one program per (ROWS tokens, head of a process). _decode: one program per ROWS rows of one process's message.
"""

import triton
import triton.language as tl

from ..router import block_count
from .launch import launch
from .numerics import INT8_BIAS, INT8_MAX, MIN_MAGNITUDE
from .planes import tile_rows

ROWS = 32
K_PLACE = tl.constexpr(1)  # k's among q, k, v


@triton.jit(do_not_specialize=["heads", "processes", "tokens"])
def _encode(
    x, shift, codes, scales,
    x_stride_b, x_stride_n, x_stride_p, x_stride_h, x_stride_d, shift_stride_p, shift_stride_b, shift_stride_h,
    codes_stride_p, codes_stride_n, codes_stride_b, codes_stride_h,
    scales_stride_p, scales_stride_n, scales_stride_b, scales_stride_h,
    heads, processes, tokens, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows, d = tile_rows(tl.program_id(0), ROWS), tl.arange(0, D)
    plane = tl.program_id(1).to(tl.int64)
    h, p, b = plane % heads, plane // heads % processes, plane // heads // processes
    inside = rows < tokens
    x += b * x_stride_b + p * x_stride_p + h * x_stride_h
    tile = tl.load(x + rows[:, None] * x_stride_n + d * x_stride_d, mask=inside[:, None], other=0.0).to(tl.float32)
    if shift is not None:
        tile -= tl.load(shift + p * shift_stride_p + b * shift_stride_b + h * shift_stride_h + d)  # [ROWS, D]
    # a maximum loses NaN; this sum is 0, or NaN where the row holds NaN or infinity
    broken = tl.sum(tile * 0.0, axis=1)
    largest = tl.maximum(tl.max(tl.abs(tile), axis=1), MIN_MAGNITUDE)  # [ROWS]
    # the bias rounds, and the last byte of the sum is the INT8
    biased = tile * (1.0 / largest)[:, None] * INT8_MAX + INT8_BIAS
    codes += p * codes_stride_p + b * codes_stride_b + h * codes_stride_h
    tl.store(
        codes + rows[:, None] * codes_stride_n + d, biased.to(tl.int32, bitcast=True).to(tl.int8), mask=inside[:, None]
    )
    scales += p * scales_stride_p + b * scales_stride_b + h * scales_stride_h
    tl.store(scales + rows * scales_stride_n, largest / INT8_MAX + broken, mask=inside)


@triton.jit(do_not_specialize=["heads", "batch", "rows_each"])
def _decode(
    codes, scales, shift, whole, codes_stride_p, scales_stride_p, shift_stride_p, heads, batch, rows_each,
    D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows, d = tile_rows(tl.program_id(0), ROWS), tl.arange(0, D)
    p = tl.program_id(1).to(tl.int64)
    inside = rows < rows_each
    at = rows[:, None] * D + d
    tile = tl.load(codes + p * codes_stride_p + at, mask=inside[:, None], other=0).to(tl.float32)  # [ROWS, D]
    tile *= tl.load(scales + p * scales_stride_p + rows, mask=inside, other=0.0)[:, None]
    is_k = inside & (rows // heads % 3 == K_PLACE)
    bh = rows // (3 * heads) % batch * heads + rows % heads
    tile += tl.load(shift + p * shift_stride_p + bh[:, None] * D + d, mask=is_k[:, None], other=0.0)
    tl.store(whole + p * rows_each * D + at, tile.to(whole.dtype.element_ty), mask=inside[:, None])


def encode(x, shift, codes, scales):
    """Fills codes, int8 (P, N, B, H, D), and scales, float32 (P, N, B, H), of x (B, N, P, H, D), any strides.

    All but x are contiguous in D. shift: float32 (P, B, H, D) to subtract first, or None.
    """
    batch, tokens, processes, heads, head_dim = x.shape
    shift_strides = (0, 0, 0) if shift is None else shift.stride()[:3]
    launch(
        _encode, (block_count(tokens, ROWS), batch * processes * heads), x, shift, codes, scales,
        *x.stride(), *shift_strides, *codes.stride()[:4], *scales.stride(), heads, processes, tokens,
        D=head_dim, ROWS=ROWS, options={"num_warps": 4},
    )  # fmt: skip


def decode(codes, scales, shift, whole):
    """Fills whole, (P, N, B, 3, H, D), contiguous, of codes alike, scales (P, N, B, 3, H) and k's shift (P, B, H, D).

    codes, scales and shift: contiguous but for their first dimension.
    """
    processes, tokens, batch, three, heads, head_dim = codes.shape
    rows = tokens * batch * three * heads
    launch(
        _decode, (block_count(rows, ROWS), processes), codes, scales, shift, whole,
        codes.stride(0), scales.stride(0), shift.stride(0), heads, batch, rows,
        D=head_dim, ROWS=ROWS, options={"num_warps": 4},
    )  # fmt: skip
