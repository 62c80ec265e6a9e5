"""The linear branch of one query tile, O_l = phi(Q_i) H_i / (phi(Q_i) Z_i), and the ratio of rows where it has no weight.

One program per (query tile, head). Apart from the sparse loop because that one has no register to spare: O_l waits in
the output until the loop mixes them, and what decides the ratio in row_ratio.
"""

import triton
import triton.language as tl

from ..router import LEAST_LINEAR_WEIGHT, block_count
from .launch import launch

LEAST_WEIGHT = tl.constexpr(LEAST_LINEAR_WEIGHT)


@triton.jit(do_not_specialize=["heads", "first_head", "q_tokens", "q_blocks"])
def _linear_attention(
    q, sums, out, ratios, row_ratio,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, out_stride_b, out_stride_h, out_stride_n, out_stride_d,
    heads, first_head, q_tokens, q_blocks, D: tl.constexpr, TILE: tl.constexpr, Q_BLOCK: tl.constexpr,
):  # fmt: skip
    tile, slot = tl.program_id(0), tl.program_id(1).to(tl.int64)
    bh = first_head + slot
    q_block = tile * TILE // Q_BLOCK
    rows, d = (tile * TILE + tl.arange(0, TILE)).to(tl.int64), tl.arange(0, D)
    inside = rows[:, None] < q_tokens
    q_at = q + bh // heads * q_stride_b + bh % heads * q_stride_h + rows[:, None] * q_stride_n + d * q_stride_d
    h_at = sums + (slot * q_blocks + q_block) * ((D + 1) * D)
    h = tl.load(h_at + d[:, None] * D + d)
    z = tl.load(h_at + D * D + d).to(tl.float32)
    queries = tl.load(q_at, mask=inside, other=0.0)

    # phi's own denominator cancels between numerator and normaliser
    wide = queries.to(tl.float32)
    exponentials = tl.exp(wide - tl.max(wide, axis=1)[:, None])
    norm = tl.sum(exponentials * z, axis=1)
    product = tl.dot(exponentials.to(h.dtype), h, input_precision="tf32x3")
    weightless = norm < LEAST_WEIGHT
    o_linear = tl.where(weightless, 0.0, 1.0 / norm)[:, None] * product
    out_at = out + bh // heads * out_stride_b + bh % heads * out_stride_h
    tl.store(out_at + rows[:, None] * out_stride_n + d * out_stride_d, o_linear.to(out.dtype.element_ty), mask=inside)
    ratio_at = row_ratio + bh * q_tokens + rows
    if ratios is None:
        # the log2 of an unselected mass of 0: the ratio becomes 1
        tl.store(ratio_at, tl.full([TILE], float("-inf"), tl.float32), mask=weightless & (rows < q_tokens))
    else:
        ratio = tl.load(ratios + bh * q_blocks + q_block)
        tl.store(ratio_at, tl.where(weightless, 1.0, ratio), mask=rows < q_tokens)


def linear_attention(q, work, out, ratios, row_ratio, heads_slice, *, q_block, config, plan=None):
    """Writes O_l into out (B, H, N, D) for the heads of ``heads_slice``, from the sums of ``work`` (a Workspace).

    ratios: (B * H, T_m): row_ratio (B, H, N) becomes the ratio of each row, 1 where O_l has no weight. None where they are
    estimated: there row_ratio, the log2 of the unselected mass, becomes minus infinity.
    """
    heads, tokens, head_dim = q.shape[1:]
    grid = (block_count(tokens, config.tile_m), heads_slice.stop - heads_slice.start)
    launch(
        plan, _linear_attention, grid, q, work.query_sums, out, ratios, row_ratio, *q.stride(), *out.stride(),
        heads, heads_slice.start, tokens, work.query_sums.shape[1],
        D=head_dim, TILE=config.tile_m, Q_BLOCK=q_block,
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )  # fmt: skip
