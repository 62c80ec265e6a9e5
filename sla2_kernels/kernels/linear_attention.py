"""The linear branch of one query tile, O_l = phi(Q_i) H_i / (phi(Q_i) Z_i), and the ratio of rows where it has no weight.

One program per (query tile, head). Before the sparse loop because that one has no register to spare: O_l waits in the
output until the loop mixes the two, and what decides the ratio waits where the ratio goes. The INT8 loop's programs do
their own rows in the end (linear_rows).
"""

import triton
import triton.language as tl

from ..router import block_count
from ..support import triton_version
from .launch import launch
from .numerics import LOG2_E, MIN_LINEAR_WEIGHT
from .pairs import widened
from .planes import EVICT_FIRST, load_tile, plane_of, store_tile, tile_rows
from .product_order import place_of

WEIGHT_COLUMNS = tl.constexpr(8 if triton_version() >= (3, 5) else 16)  # equal ones; a product has no fewer


@triton.jit
def linear_rows(queries, h, z, BY_PRODUCT: tl.constexpr):
    """(phi(Q) H_i [rows, D] in float32, phi(Q) Z_i [rows]) of rows of one query block. queries [rows, D]: their Q. h [D, D], z [D]:
    H_i and Z_i. BY_PRODUCT: whether the second is a product too, so that the threads that divide by it have it."""
    wide = widened(queries)
    # phi(Q) without its denominator, as phi_numerator() has it; a power of two takes a third of exp's instructions
    phi = tl.exp2(wide * LOG2_E - (tl.max(wide, axis=1) * LOG2_E)[:, None])
    low = phi.to(h.dtype)
    if BY_PRODUCT:
        product = tl.dot(low, h, input_precision="tf32x3")
        columns = tl.broadcast_to(z.to(h.dtype)[:, None], [z.shape[0], WEIGHT_COLUMNS])
        weight = tl.max(tl.dot(low, columns, input_precision="tf32x3"), axis=1)
    else:
        weight = tl.sum(phi * z, axis=1)
        product = tl.dot(low, h, input_precision="tf32x3")
    return product, weight


@triton.jit
def query_sums_of(sums, block, columns, D: tl.constexpr):
    """(H_i [D, D], Z_i [D] in float32) of a query block. columns [D]: where H_i's columns lie."""
    d = tl.arange(0, D)
    at = sums + block * ((D + 1) * D)
    h = tl.load(at + d[:, None] * D + columns, eviction_policy=EVICT_FIRST)
    return h, tl.load(at + D * D + d).to(tl.float32)


@triton.jit(do_not_specialize=["heads", "first_head", "tokens"])
def _linear_attention(
    q, sums, out, block_ratio, ratio,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, out_stride_b, out_stride_h, out_stride_n, out_stride_d,
    heads, first_head, tokens, D: tl.constexpr, TILE: tl.constexpr, QUERY_BLOCK: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    tile, slot = tl.program_id(0), tl.program_id(1).to(tl.int64)
    bh = first_head + slot
    q_blocks, q_block = tl.cdiv(tokens, QUERY_BLOCK), tile * TILE // QUERY_BLOCK
    d = tl.arange(0, D)
    # loaded channel after channel: Triton 3.2 ends the process where float32 is put in order later
    h, z = query_sums_of(sums, slot * q_blocks + q_block, place_of(d, D) if ORDERED else d, D)
    rows = tile_rows(tile, TILE)
    q_plane = plane_of(q, bh, heads, q_stride_b, q_stride_h)
    out_plane = plane_of(out, bh, heads, out_stride_b, out_stride_h)
    product, weight = linear_rows(load_tile(q_plane, rows, d, q_stride_n, q_stride_d, tokens), h, z, False)
    weightless = weight < MIN_LINEAR_WEIGHT
    o_linear = tl.where(weightless, 0.0, 1.0 / weight)[:, None] * product
    store_tile(out_plane, rows, d, out_stride_n, out_stride_d, tokens, o_linear)
    ratio_at = ratio + bh * tokens + rows
    if block_ratio is None:
        # the log2 of an unselected mass of 0: the ratio becomes 1
        tl.store(ratio_at, tl.full([TILE], float("-inf"), tl.float32), mask=weightless & (rows < tokens))
    else:
        of_block = tl.load(block_ratio + bh * q_blocks + q_block)
        tl.store(ratio_at, tl.where(weightless, 1.0, of_block), mask=rows < tokens)


def linear_attention(q, work, out, block_ratio, ratio, group, *, query_block, ordered, config):
    """Writes O_l into out (B, H, N, D) for the heads of slice ``group``, from the sums of ``work`` (a Workspace).

    block_ratio: (B * H, T_m): ratio (B, H, N) becomes that of each row's query block, 1 where O_l has no weight. None
    where ratios are estimated: there ``ratio``, the log2 of the unselected mass, becomes minus infinity. ordered: whether H_i's
    channels have the places of product_order.py.
    """
    heads, tokens, head_dim = q.shape[1:]
    launch(
        _linear_attention, (block_count(tokens, config.tile_m), group.stop - group.start),
        q, work.query_sums, out, block_ratio, ratio, *q.stride(), *out.stride(), heads, group.start, tokens,
        D=head_dim, TILE=config.tile_m, QUERY_BLOCK=query_block,
        ORDERED=ordered, options=config.options,
    )  # fmt: skip
