"""How large V's channels are, per head: the powers of two that INT8 V is divided by, so that one large channel does not
take the others' precision.

One program per head looks at up to SAMPLED rows, spread over all. A power that is too small or too large costs precision
alone: pack.py scales every block by its own largest element.
"""

import torch
import triton
import triton.language as tl

from .launch import launch
from .numerics import MIN_MAGNITUDE
from .tiles import plane_of, tile_at

SAMPLED, STEP = 256, 128
MIN_SHARE = tl.constexpr(2.0**-3)  # of the largest channel: what is small in the sample may be large elsewhere


@triton.jit(do_not_specialize=["heads", "tokens"])
def _value_channels(
    v, channel, stride_b, stride_h, stride_n, stride_d, heads, tokens,
    D: tl.constexpr, SAMPLED: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D)
    plane = plane_of(v, bh, heads, stride_b, stride_h)
    largest = tl.zeros([D], dtype=tl.float32)
    for start in range(0, SAMPLED, STEP):
        rows = (start + tl.arange(0, STEP)).to(tl.int64) * tokens // SAMPLED
        tile = tl.load(tile_at(plane, rows, d, stride_n, stride_d))  # [STEP, D]
        largest = tl.maximum(largest, tl.max(tl.abs(tile.to(tl.float32)), axis=0))
    size = tl.maximum(largest, tl.maximum(tl.max(largest, axis=0) * MIN_SHARE, MIN_MAGNITUDE))
    # float32's exponent alone: the power of two at or below
    power = (size.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    tl.store(channel + bh * D + d, power)


def value_channels(v):
    """float32 (B * H, D), powers of two: about the largest element of each channel of v (B, H, M, D), any stride."""
    batch, heads, tokens, head_dim = v.shape
    channel = torch.empty(batch * heads, head_dim, dtype=torch.float32, device=v.device)
    launch(
        _value_channels, (batch * heads,), v, channel, *v.stride(), heads, tokens,
        D=head_dim, SAMPLED=SAMPLED, STEP=STEP, options={"num_warps": 8},
    )  # fmt: skip
    return channel
