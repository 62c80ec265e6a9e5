"""The linear branch of one query tile, O_l = phi(Q_i) H_i / (phi(Q_i) Z_i).

One program per (query tile, head). Apart from the sparse loop because that one has no register to spare: O_l waits in
the output until the loop mixes them.
"""

import triton
import triton.language as tl

from ..router import block_count
from .launch import launch


@triton.jit(do_not_specialize=["heads", "first_head", "q_tokens", "q_blocks"])
def _linear_attention(
    q, sums, out, q_stride_b, q_stride_h, q_stride_n, q_stride_d, out_stride_b, out_stride_h, out_stride_n, out_stride_d,
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
    # where Q and every unselected key are sharp in other features, float16 keeps nothing of phi(K): 0, not 0 / 0
    o_linear = tl.where(norm[:, None] > 0, product / norm[:, None], 0.0)
    out_at = out + bh // heads * out_stride_b + bh % heads * out_stride_h
    tl.store(out_at + rows[:, None] * out_stride_n + d * out_stride_d, o_linear.to(out.dtype.element_ty), mask=inside)


def linear_attention(q, work, out, heads_slice, *, q_block, config, plan=None):
    """Writes O_l into out (B, H, N, D) for the heads of ``heads_slice``, from the sums of ``work`` (a Workspace)."""
    heads, tokens, head_dim = q.shape[1:]
    grid = (block_count(tokens, config.tile_m), heads_slice.stop - heads_slice.start)
    launch(
        plan, _linear_attention, grid, q, work.query_sums, out, *q.stride(), *out.stride(),
        heads, heads_slice.start, tokens, work.query_sums.shape[1],
        D=head_dim, TILE=config.tile_m, Q_BLOCK=q_block,
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )  # fmt: skip
