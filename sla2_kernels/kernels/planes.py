"""Where a tile of a (B, H, N, D) tensor of any strides lies, and reading and writing it.

A "plane" is the (N, D) matrix of one (batch, head); ``bh`` is that pair's number, int64 because offsets in long videos
do not fit 32 bits.
"""

import triton
import triton.language as tl

from ..router import K_BLOCK
from ..support import interpreting
from .numerics import INTERPRETED

# A plain integer in Triton's interpreter, which knows no int % constexpr.
KEY_BLOCK = K_BLOCK if interpreting() else tl.constexpr(K_BLOCK)  # keys that are selected or left out together
LINE = tl.constexpr(64)  # numbers of 16 bit in what L2 fetches at a time
# Which lines L2 gives up first: what the kernel does not come back to. Others have no policy.
EVICT_FIRST = tl.constexpr("evict_first")
NO_POLICY = tl.constexpr("")


@triton.jit
def plane_of(x, bh, heads, stride_b, stride_h):
    """Where the plane of one (batch, head) begins."""
    return x + bh // heads * stride_b + bh % heads * stride_h


@triton.jit
def tile_at(plane, rows, columns, stride_n, stride_d):
    """Addresses of the elements [rows, columns] of a plane."""
    return plane + rows[:, None] * stride_n + columns * stride_d


@triton.jit
def load_tile(plane, rows, columns, stride_n, stride_d, tokens, POLICY: tl.constexpr = NO_POLICY):
    """[rows, columns] of a plane that has ``tokens`` rows; zeros past its end. POLICY: L2's, as above."""
    at = tile_at(plane, rows, columns, stride_n, stride_d)
    return tl.load(at, mask=rows[:, None] < tokens, other=0.0, eviction_policy=POLICY)


@triton.jit
def store_tile(plane, rows, columns, stride_n, stride_d, tokens, values):
    """Writes [rows, columns] of a plane that has ``tokens`` rows, in the plane's dtype."""
    at = tile_at(plane, rows, columns, stride_n, stride_d)
    tl.store(at, values.to(plane.dtype.element_ty), mask=rows[:, None] < tokens)


@triton.jit
def ask_for_rows(plane, rows, stride_n, stride_d, D: tl.constexpr):
    """Has L2 fetch these rows of a plane, without waiting."""
    if not INTERPRETED:
        lines = LINE * tl.arange(0, (D + LINE - 1) // LINE)[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1];\nmov.b32 $0, 0;", "=r,l", [tile_at(plane, rows, lines, stride_n, stride_d)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def tile_rows(tile, ROWS: tl.constexpr):
    """int64 numbers of a tile's rows."""
    return (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)


@triton.jit
def valid_rows(blocks, tokens):
    """How many rows of these key blocks hold keys, float32: KEY_BLOCK but for a ragged last block."""
    return tl.minimum(tokens - blocks * KEY_BLOCK, KEY_BLOCK).to(tl.float32)
