"""h_j, stored feature by feature, as an 8-bit matrix operand, which lies along the key blocks (Gluon)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

_LANES = [[2, 0], [4, 0], [0, 4], [0, 8], [0, 16]]
_WARPS = [[0, 32], [0, 64]]


@gluon.constexpr_function
def layout_of_h():
    """Of h (64 key blocks, 128 features) in registers. Lanes 0 1: key block bits 1 2, so that the four rows that a warp reads
    lie in different banks."""
    registers = [[0, 1], [0, 2], [1, 0], [8, 0], [16, 0], [32, 0]]
    return gl.DistributedLinearLayout(registers, _LANES, _WARPS, [], [64, 128])


@gluon.constexpr_function
def layout_of_sums():
    """(128 rows, 128 features) as the accumulators lie, four neighbouring features a thread."""
    registers = [[0, 1], [0, 2], [1, 0], [8, 0], [16, 0], [32, 0], [64, 0]]
    return gl.DistributedLinearLayout(registers, _LANES, _WARPS, [], [128, 128])


@gluon.jit
def along_key_blocks(h):
    """8 bits of h (64 key blocks, 128 features) as (128, 64), without moving anything between threads.

    Its rows are the features in the order of bits 1, 6 5, 0, 4 3 2 of their numbers, its columns the key blocks in the
    order of bits 5 4, 2 1, 3, 0: that of the weights.
    """
    h = h.reshape([4, 2, 4, 2, 32, 4]).permute([0, 2, 4, 5, 1, 3])
    even, odd = h.split()
    h0, h2 = even.split()
    h1, h3 = odd.split()
    y0, y1, y2, y3 = gl.inline_asm_elementwise(
        """
        {
        .reg .b32 t0, t1, u0, u1;
        prmt.b32 t0, $4, $5, 0x5140;
        prmt.b32 t1, $4, $5, 0x7362;
        prmt.b32 u0, $6, $7, 0x5140;
        prmt.b32 u1, $6, $7, 0x7362;
        prmt.b32 $0, t0, u0, 0x5410;
        prmt.b32 $1, t0, u0, 0x7632;
        prmt.b32 $2, t1, u1, 0x5410;
        prmt.b32 $3, t1, u1, 0x7632;
        }
        """,
        "=r,=r,=r,=r,r,r,r,r", [h0, h1, h2, h3], dtype=[gl.int8] * 4, is_pure=True, pack=4,
    )  # fmt: skip
    y = gl.join(gl.join(y0, y2), gl.join(y1, y3))  # (5 4, 2 1, feature 6..2, word, feature 1, feature 0)
    return y.reshape([4, 4, 4, 8, 4, 2, 2]).permute([5, 2, 6, 3, 0, 1, 4]).reshape([128, 64])
