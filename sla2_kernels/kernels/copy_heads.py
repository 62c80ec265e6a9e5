"""Copies of groups of heads between tensors of unlike strides, up to three at a time; see peer_copies.py.

_copy: one program per (PIECES pieces of V channels, slot and batch), of q, k and v alike. Pieces go by token, head and channel:
consecutive programs read and write consecutive memory, by 16 bytes where strides allow it.
"""

from math import gcd

import torch
import triton
import triton.language as tl

from ..router import block_count
from .launch import launch

PIECES = 512  # of one tensor that a program copies
PIECE = 16  # bytes at most
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit(do_not_specialize=["heads", "tokens", "batch"])
def _copy(
    x, y, z, into, stride_s, stride_n, stride_b, stride_h, stride_d,
    into_stride_s, into_stride_n, into_stride_b, into_stride_place, into_stride_h,
    heads, tokens, batch, D: tl.constexpr, V: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    s, b = (tl.program_id(1) // batch).to(tl.int64), (tl.program_id(1) % batch).to(tl.int64)
    width = heads * (D // V)
    begin = tl.program_id(0).to(tl.int64) * PIECES
    # one division of 64 bits a program, those of the pieces have 32
    piece = (begin % width).to(tl.int32) + tl.arange(0, PIECES)
    n = begin // width + piece // width
    h, first = (piece % width // (D // V)).to(tl.int64), piece % (D // V) * V
    channels = tl.arange(0, V)
    source = s * stride_s + b * stride_b + n * stride_n + h * stride_h + first * stride_d
    source = source[:, None] + channels * stride_d  # [PIECES, V]
    into += s * into_stride_s + b * into_stride_b
    into += (n * into_stride_n + h * into_stride_h + first)[:, None] + channels
    inside = (n < tokens)[:, None]
    # all loads are under way before the first store
    of_x = tl.load(x + source, mask=inside, other=0)
    if y is not None:
        of_y = tl.load(y + source, mask=inside, other=0)
        of_z = tl.load(z + source, mask=inside, other=0)
    tl.store(into, of_x, mask=inside)
    if y is not None:
        tl.store(into + into_stride_place, of_y, mask=inside)
        tl.store(into + 2 * into_stride_place, of_z, mask=inside)


def copy_heads(into, sources):
    """into[:, :, :, place] = sources[place].

    into: (S, N, B, 1 or 3, G, D), contiguous in D. sources: one or three (S, N, B, G, D) of its dtype, any strides.
    """
    if len({x.stride() for x in sources}) > 1:
        for place, x in enumerate(sources):
            copy_heads(into[:, :, :, place : place + 1], [x])
        return
    slots, tokens, batch, heads, head_dim = sources[0].shape
    size = into.element_size()
    channels = gcd(head_dim, PIECE // size)
    # a copy keeps bits, whatever the dtype
    x, y, z = (*(x.view(WORDS[size]) for x in sources), None, None)[:3]
    launch(
        _copy, (block_count(tokens * heads * head_dim // channels, PIECES), slots * batch), x, y, z, into.view(WORDS[size]),
        *sources[0].stride(), *into.stride()[:5], heads, tokens, batch,
        D=head_dim, V=channels, PIECES=PIECES, options={"num_warps": 4},
    )  # fmt: skip
