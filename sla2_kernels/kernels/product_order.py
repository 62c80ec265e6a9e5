"""Where the numbers of a matrix product lie in the threads of cards with mma.sync, and how they leave in wide stores.

Of each 16 rows and 64 columns a thread has rows r and r + 8 and, for a column's bits aaabbc, the columns of one bb. So what is
multiplied with, V and h_j, has its channels in other places: bits aaabbc of a channel as bbaaac. Then a thread has eight
neighbouring channels of the product, and nothing changes threads before it is stored.
"""

import triton
import triton.language as tl

GROUP = 64  # channels that change places with each other, or all of fewer


@triton.jit
def channel_at(place, D: tl.constexpr):
    """The channel in a place."""
    SIZE: tl.constexpr = D if D < 64 else 64
    return place // SIZE * SIZE + place % 2 + place % SIZE // (SIZE // 4) * 2 + place % (SIZE // 4) // 2 * 8


@triton.jit
def place_of(channel, D: tl.constexpr):
    """The place of a channel."""
    SIZE: tl.constexpr = D if D < 64 else 64
    return channel // SIZE * SIZE + channel % 2 + channel % SIZE // 8 * 2 + channel % 8 // 2 * (SIZE // 4)


@triton.jit
def row_at(place, WARPS: tl.constexpr):
    """The row in each place of a tile that is stored: a warp multiplies 16 neighbouring rows, and stores 8."""
    rest = place // 8
    return (rest // (2 * WARPS) * WARPS + rest % WARPS) * 16 + rest // WARPS % 2 * 8 + place % 8


@triton.jit
def rows_as_stored(x, WARPS: tl.constexpr):
    """x [rows] of a product's rows, in the order of row_at()."""
    ROWS: tl.constexpr = x.shape[0]
    return x.reshape([ROWS // (16 * WARPS), WARPS, 2, 8]).permute([0, 2, 1, 3]).reshape([ROWS])


@triton.jit
def by_channel(x):
    """A product [rows, D], channel after channel."""
    ROWS: tl.constexpr = x.shape[0]
    D: tl.constexpr = x.shape[1]
    SIZE: tl.constexpr = D if D < 64 else 64
    return x.reshape([ROWS, D // SIZE, 4, SIZE // 8, 2]).permute([0, 1, 3, 2, 4]).reshape([ROWS, D])


@triton.jit
def halves(x):
    """The first and the last half of x's columns."""
    return x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute([0, 2, 1]).split()


@triton.jit
def quarters_as_stored(x, WARPS: tl.constexpr):
    """A product [rows, D] in up to four parts of 32 channels, channel after channel, its rows in the order of row_at()."""
    ROWS: tl.constexpr = x.shape[0]
    D: tl.constexpr = x.shape[1]
    x = by_channel(x).reshape([ROWS // (16 * WARPS), WARPS, 2, 8, D]).permute([0, 2, 1, 3, 4]).reshape([ROWS, D])
    first = x
    second = x
    third = x
    fourth = x
    if D == 128:
        left, right = halves(x)
        first, second = halves(left)
        third, fourth = halves(right)
    elif D == 64:
        first, second = halves(x)
    return first, second, third, fourth
