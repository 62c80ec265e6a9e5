"""The linear branch of one query tile, O_l = phi(Q_i) H_i / (phi(Q_i) Z_i), and the ratio of rows where it has no weight.

One program per (query tile, head). Apart from the sparse loop because that one has no register to spare: O_l waits in
the output until the loop mixes the two, and what decides the ratio waits where the ratio goes.
"""

import triton
import triton.language as tl

from ..router import block_count
from .launch import launch
from .numerics import MIN_LINEAR_WEIGHT, phi_numerator
from .tiles import QUERY_BLOCK, load_tile, plane_of, store_tile, tile_rows


@triton.jit(do_not_specialize=["heads", "first_head", "tokens"])
def _linear_attention(
    q, sums, out, block_ratio, ratio,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, out_stride_b, out_stride_h, out_stride_n, out_stride_d,
    heads, first_head, tokens, D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tile, slot = tl.program_id(0), tl.program_id(1).to(tl.int64)
    bh = first_head + slot
    q_blocks, q_block = tl.cdiv(tokens, QUERY_BLOCK), tile * TILE // QUERY_BLOCK
    rows, d = tile_rows(tile, TILE), tl.arange(0, D)
    h_at = sums + (slot * q_blocks + q_block) * ((D + 1) * D)
    h = tl.load(h_at + d[:, None] * D + d)  # [D, D]
    z = tl.load(h_at + D * D + d).to(tl.float32)  # [D]
    q_plane = plane_of(q, bh, heads, q_stride_b, q_stride_h)
    queries = load_tile(q_plane, rows, d, q_stride_n, q_stride_d, tokens)  # [TILE, D]

    phi = phi_numerator(queries.to(tl.float32), 1)
    norm = tl.sum(phi * z, axis=1)  # [TILE]
    product = tl.dot(phi.to(h.dtype), h, input_precision="tf32x3")  # [TILE, D]
    weightless = norm < MIN_LINEAR_WEIGHT
    o_linear = tl.where(weightless, 0.0, 1.0 / norm)[:, None] * product
    store_tile(
        plane_of(out, bh, heads, out_stride_b, out_stride_h), rows, d, out_stride_n, out_stride_d, tokens, o_linear
    )
    ratio_at = ratio + bh * tokens + rows
    if block_ratio is None:
        # the log2 of an unselected mass of 0: the ratio becomes 1
        tl.store(ratio_at, tl.full([TILE], float("-inf"), tl.float32), mask=weightless & (rows < tokens))
    else:
        of_block = tl.load(block_ratio + bh * q_blocks + q_block)
        tl.store(ratio_at, tl.where(weightless, 1.0, of_block), mask=rows < tokens)


def linear_attention(q, work, out, block_ratio, ratio, group, *, config):
    """Writes O_l into out (B, H, N, D) for the heads of slice ``group``, from the sums of ``work`` (a Workspace).

    block_ratio: (B * H, T_m): ratio (B, H, N) becomes that of each row's query block, 1 where O_l has no weight. None
    where ratios are estimated: there ``ratio``, the log2 of the unselected mass, becomes minus infinity.
    """
    heads, tokens, head_dim = q.shape[1:]
    launch(
        _linear_attention, (block_count(tokens, config.tile_m), group.stop - group.start),
        q, work.query_sums, out, block_ratio, ratio, *q.stride(), *out.stride(), heads, group.start, tokens,
        D=head_dim, TILE=config.tile_m, options=config.options,
    )  # fmt: skip
