"""How large the channels are, per head, from up to SAMPLED rows spread over all: what INT8 needs to know of them.

INT8 has one scale per block, so a channel far larger than the others takes their precision. Q and K: each channel of Q is
divided by the root of its spread in Q over that in K, and K's multiplied with it, which changes no logit. V: each channel is
divided by a power of two, which the output gets back. A factor that the sample makes too small or too large costs precision
alone: every block is scaled by its own largest element afterwards.
"""

import triton
import triton.language as tl

from .. import quantization
from .numerics import MIN_MAGNITUDE
from .planes import tile_at

SAMPLED = quantization.BALANCE_ROWS
STEP = 16  # rows at a time
MIN_SPREAD = tl.constexpr(quantization.MIN_SPREAD)
MIN_SHARE = tl.constexpr(2.0**-3)  # of V's largest channel: what is small in the sample may be large elsewhere


@triton.jit
def _sampled_rows(start, tokens, SAMPLED: tl.constexpr, STEP: tl.constexpr):
    return (start + tl.arange(0, STEP)).to(tl.int64) * tokens // SAMPLED


@triton.jit
def balance_channels(
    q_plane, k_plane, out, q_stride_n, q_stride_d, k_stride_n, k_stride_d, q_tokens, k_tokens,
    D: tl.constexpr, SAMPLED: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """What to multiply K's channels with, at ``out``, and Q's, right behind; float32 (D,) each. As quantization.balance()."""
    d = tl.arange(0, D)
    # K's spread is about its mean: taken off a row first, a large mean costs no precision
    first = tl.load(k_plane + d * k_stride_d).to(tl.float32)
    q_squares = tl.zeros([D], dtype=tl.float32)
    k_squares = tl.zeros([D], dtype=tl.float32)
    k_total = tl.zeros([D], dtype=tl.float32)
    for start in range(0, SAMPLED, STEP):
        q_rows = _sampled_rows(start, q_tokens, SAMPLED, STEP)
        k_rows = _sampled_rows(start, k_tokens, SAMPLED, STEP)
        q_tile = tl.load(tile_at(q_plane, q_rows, d, q_stride_n, q_stride_d)).to(tl.float32)  # [STEP, D]
        k_tile = tl.load(tile_at(k_plane, k_rows, d, k_stride_n, k_stride_d)).to(tl.float32) - first
        # a NaN or infinity in Q is to spoil its own block alone
        q_squares += tl.sum(tl.where(tl.abs(q_tile) < float("inf"), q_tile * q_tile, 0.0), axis=0)
        k_squares += tl.sum(k_tile * k_tile, axis=0)
        k_total += tl.sum(k_tile, axis=0)
    k_squares -= k_total * k_total / SAMPLED
    q_spread = tl.maximum(q_squares, tl.max(q_squares, axis=0) * MIN_SPREAD)
    k_spread = tl.maximum(k_squares, tl.max(k_squares, axis=0) * MIN_SPREAD)
    factor = tl.sqrt(tl.sqrt(q_spread / k_spread))
    # where a sample is all zeros or not finite
    factor = tl.where((factor > 0) & (factor < float("inf")), factor, 1.0)
    tl.store(out + d, factor)
    tl.store(out + D + d, 1.0 / factor)


@triton.jit
def value_powers(plane, out, stride_n, stride_d, tokens, D: tl.constexpr, SAMPLED: tl.constexpr, STEP: tl.constexpr):
    """float32 (D,) at ``out``, powers of two: about the largest element of each of V's channels."""
    d = tl.arange(0, D)
    largest = tl.zeros([D], dtype=tl.float32)
    for start in range(0, SAMPLED, STEP):
        tile = tl.load(tile_at(plane, _sampled_rows(start, tokens, SAMPLED, STEP), d, stride_n, stride_d))  # [STEP, D]
        largest = tl.maximum(largest, tl.max(tl.abs(tile.to(tl.float32)), axis=0))
    size = tl.maximum(largest, tl.maximum(tl.max(largest, axis=0) * MIN_SHARE, MIN_MAGNITUDE))
    # float32's exponent alone: the power of two at or below
    tl.store(out + d, (size.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True))
