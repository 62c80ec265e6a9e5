"""Products of pooled tensors to float32 precision: the router's projections and its scores.

One program per TILE x TILE tile of A B^T. Each product is three TF32 ones, whatever torch's flags say: one TF32 product
would change the selection, and float32 units are slower. Cards with mma.sync take three float16 ones instead, of operands
that _halves() has taken apart: splitting inside the product spills there. Scores leave as integers in the same order, because the top-k
(select.py) finds its threshold by counting.
"""

import torch
import triton
import triton.language as tl

from ..router import K_BLOCK, Q_BLOCK, block_count
from ..support import capability
from .configs import multiplies_by_mma_sync
from .launch import launch
from .numerics import FLOAT32_ONE, MIN_MAGNITUDE, ordered_int

TILE = 64
HALVES_ROWS = 32
SCORES_STEP = 128  # the length of a row of scores is a multiple of it, so that the top-k reads without masks
INT32_MIN = tl.constexpr(-(2**31))  # the padding, and below every score
INT32_MAX = tl.constexpr(2**31 - 1)  # a query's own key blocks and the forced ones, above every score
# a float32's exponent as an integer
FLOAT32_EXPONENT = tl.constexpr(0x7F800000)
TEN_OCTAVES = tl.constexpr(10 << 23)
KEY_BLOCK_LOG2 = tl.constexpr(K_BLOCK.bit_length() - 1)


@triton.jit(do_not_specialize=["b_heads", "b_stride_h", "rows", "cols", "diagonal", "first_free", "end_free"])
def _product(
    a, b, out, b_heads, b_stride_h, rows, cols, out_stride, diagonal, first_free, end_free,
    D: tl.constexpr, TILE: tl.constexpr, ORDERED: tl.constexpr, QUERY_BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    j = tl.program_id(1) * TILE + tl.arange(0, TILE)
    bh = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, D)
    left = tl.load(a + bh * rows * D + i[:, None] * D + d[None, :], mask=i[:, None] < rows, other=0.0)  # [TILE, D]
    right_at = b + bh % b_heads * b_stride_h + j[None, :] * D + d[:, None]
    right = tl.load(right_at, mask=j[None, :] < cols, other=0.0)  # [D, TILE]
    # in steps along D, which need less shared memory, the same product takes three times as long
    tile = tl.dot(left, right, input_precision="tf32x3")  # [TILE, TILE]
    _store(out, tile, bh, i, j, rows, cols, out_stride, diagonal, first_free, end_free, ORDERED, QUERY_BLOCK)


@triton.jit
def _store(
    out, tile, bh, i, j, rows, cols, out_stride, diagonal, first_free, end_free,
    ORDERED: tl.constexpr, QUERY_BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes a [TILE, TILE] product. ORDERED: as scores()."""
    out_at = out + (bh * rows + i[:, None]) * out_stride + j[None, :]
    inside = (i[:, None] < rows) & (j[None, :] < out_stride)
    if ORDERED:
        # a shift, unlike a division, rounds down below zero too: the first queries' own keys may lie before these keys
        own_begin = (diagonal + i * QUERY_BLOCK) >> KEY_BLOCK_LOG2
        own_end = (diagonal + (i + 1) * QUERY_BLOCK - 1) >> KEY_BLOCK_LOG2
        own = (j[None, :] >= own_begin[:, None]) & (j[None, :] <= own_end[:, None])
        forced = (j < first_free) | (j >= end_free)
        raised = tl.where(own | forced[None, :], INT32_MAX, ordered_int(tile))
        tl.store(out_at, tl.where(j[None, :] < cols, raised, INT32_MIN), mask=inside)
    else:
        tl.store(out_at, tile, mask=inside)


@triton.jit(do_not_specialize=["a_rows", "b_rows"])
def _halves(a, b, a_high, a_low, a_power, b_high, b_low, b_power, a_rows, b_rows, D: tl.constexpr, TILE: tl.constexpr):
    """Takes both operands apart, first a, then b."""
    a_tiles = tl.cdiv(a_rows, TILE)
    tile = tl.program_id(0)
    if tile < a_tiles:
        _take_apart(a, a_high, a_low, a_power, tile, a_rows, D, TILE)
    else:
        _take_apart(b, b_high, b_low, b_power, tile - a_tiles, b_rows, D, TILE)


@triton.jit
def _take_apart(x, high, low, power, tile, rows, D: tl.constexpr, TILE: tl.constexpr):
    """x = power * (high + low) to 22 bits, high and low float16, one power of two per row."""
    i, d = tile * TILE + tl.arange(0, TILE), tl.arange(0, D)
    inside = i < rows
    at = i[:, None].to(tl.int64) * D + d[None, :]
    values = tl.load(x + at, mask=inside[:, None], other=0.0)  # [TILE, D]
    # float32's exponent, so that the row's largest becomes 2^10 to 2^11: what float16 loses then is below 2^-35 of it
    exponent = tl.maximum(tl.max(tl.abs(values), axis=1), MIN_MAGNITUDE).to(tl.int32, bitcast=True) & FLOAT32_EXPONENT
    up = (-exponent + 2 * FLOAT32_ONE + TEN_OCTAVES).to(tl.float32, bitcast=True)
    scaled = values * up[:, None]
    top = scaled.to(tl.float16)
    tl.store(high + at, top, mask=inside[:, None])
    tl.store(low + at, (scaled - top.to(tl.float32)).to(tl.float16), mask=inside[:, None])
    tl.store(power + i, (exponent - TEN_OCTAVES).to(tl.float32, bitcast=True), mask=inside)


@triton.jit(do_not_specialize=["b_heads", "rows", "cols", "diagonal", "first_free", "end_free"])
def _product_of_halves(
    a_high, a_low, a_power, b_high, b_low, b_power, out, b_heads, rows, cols, out_stride, diagonal, first_free, end_free,
    D: tl.constexpr, TILE: tl.constexpr, ORDERED: tl.constexpr, QUERY_BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    j = tl.program_id(1) * TILE + tl.arange(0, TILE)
    bh = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, D)
    a_row, b_row = bh * rows + i, bh % b_heads * cols + j
    a_at, b_at = a_row[:, None] * D + d[None, :], b_row[None, :] * D + d[:, None]
    a_inside, b_inside = i < rows, j < cols
    left = tl.load(a_high + a_at, mask=a_inside[:, None], other=0.0)  # [TILE, D]
    right = tl.load(b_high + b_at, mask=b_inside[None, :], other=0.0)  # [D, TILE]
    # the small products first; that of both low halves is below float32's precision
    tile = tl.dot(tl.load(a_low + a_at, mask=a_inside[:, None], other=0.0), right)
    tile = tl.dot(left, tl.load(b_low + b_at, mask=b_inside[None, :], other=0.0), tile)
    tile = tl.dot(left, right, tile)
    tile *= tl.load(a_power + a_row, mask=a_inside, other=0.0)[:, None]
    tile *= tl.load(b_power + b_row, mask=b_inside, other=0.0)[None, :]
    _store(out, tile, bh, i, j, rows, cols, out_stride, diagonal, first_free, end_free, ORDERED, QUERY_BLOCK)


def _in_halves(a, b):
    """(high, low, power) of float32 a (..., D), then those of b, both contiguous."""

    def halves_of(x):
        high, low = (torch.empty(x.shape, dtype=torch.float16, device=x.device) for _ in range(2))
        return high, low, torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)

    halves, rows = (*halves_of(a), *halves_of(b)), [x.numel() // x.shape[-1] for x in (a, b)]
    grid = (sum(block_count(count, HALVES_ROWS) for count in rows),)
    launch(_halves, grid, a, b, *halves, *rows, D=a.shape[-1], TILE=HALVES_ROWS, options={"num_warps": 4})
    return halves


def _launch(a, b, out, b_heads, cols, *ordering, query_block=Q_BLOCK):
    """Fills out with A B^T of a (B * H, rows, D) and b (b_heads, cols, D), contiguous; b's heads repeat.

    ordering: of scores, see scores().
    """
    batch_heads, rows, head_dim = a.shape
    grid = (block_count(rows, TILE), block_count(out.shape[-1], TILE), batch_heads)
    sizes = rows, cols, out.shape[-1], *(ordering or (0, 0, 0))
    constants = {"D": head_dim, "TILE": TILE, "ORDERED": out.dtype == torch.int32, "QUERY_BLOCK": query_block}
    options = {"num_warps": 4}
    if multiplies_by_mma_sync(capability(a.device)):
        launch(_product_of_halves, grid, *_in_halves(a, b), out, b_heads, *sizes, **constants, options=options)
    else:
        launch(_product, grid, a, b, out, b_heads, cols * head_dim, *sizes, **constants, options=options)
    return out


def project(pooled, proj):
    """x @ W^T of pooled (B * H, T, D) with W (D, D) or (H, D, D), float32 and contiguous; None is the identity."""
    if proj is None:
        return pooled
    heads = 1 if proj.dim() == 2 else proj.shape[0]
    return _launch(pooled, proj, torch.empty_like(pooled), heads, proj.shape[-1])


def scores(q_pooled, k_pooled, query_block, diagonal=None, forced=(0, 0)):
    """Router scores of (B * H, T_m, D) and (B * H, T_n, D) as int32 (B * H, T_m, T_n padded to whole SCORES_STEPs).

    They are in the order of the float32 scores, up to a positive factor, and the padding is below all. diagonal: which key
    is the first query's own; the key blocks of each query block's own tokens then are above all. None leaves the scores alone. forced: so many
    key blocks at the start and the end are above all, too.
    """
    batch_heads, key_blocks, _ = k_pooled.shape
    width = block_count(key_blocks, SCORES_STEP) * SCORES_STEP
    out = torch.empty(batch_heads, q_pooled.shape[1], width, dtype=torch.int32, device=q_pooled.device)
    nowhere = width * K_BLOCK
    own = nowhere if diagonal is None else diagonal
    ordering = own, forced[0], key_blocks - forced[1]
    return _launch(q_pooled, k_pooled, out, batch_heads, key_blocks, *ordering, query_block=query_block)
