"""The linear branch of one query tile, O_l = phi(Q_i) H_i / (phi(Q_i) Z_i), and the attention mass it stands for.

One program per (query tile, head). Apart from the sparse loop because that one has no register to spare: O_l waits in
the output, the mass in the ratio's place, until the loop mixes them.

The unselected mass is estimated from block means: sum over unselected blocks of n_j exp(q . mean(K_j) * scale), kept as
log2. It is the mass that the ratio weighs against the selected blocks' exact one when no ratio was learned.
"""

import triton
import triton.language as tl

from ..router import block_count
from .launch import launch

LOWEST = tl.constexpr(-1.0e30)  # finite, so that differences of maxima are


@triton.jit
def _unselected_log2_mass(
    q, k_means, unselected, blocks, tokens, scale_log2, D: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    d = tl.arange(0, D)
    row_max = tl.full([q.shape[0]], LOWEST, dtype=tl.float32)
    row_sum = tl.zeros([q.shape[0]], dtype=tl.float32)
    for start in range(0, blocks, STEP):
        j = start + tl.arange(0, STEP)
        means = tl.load(k_means + j[None, :] * D + d[:, None], mask=j[None, :] < blocks, other=0.0)
        counted = tl.load(unselected + j, mask=j < blocks, other=0.0) > 0
        live = tl.maximum(tl.minimum(tokens - j * BLOCK, BLOCK), 1).to(tl.float32)
        weight = tl.where(counted, tl.log2(live), LOWEST)
        logits = tl.dot(q, means, input_precision="tf32x3") * scale_log2 + weight[None, :]
        new_max = tl.maximum(row_max, tl.max(logits, axis=1))
        row_sum = row_sum * tl.exp2(row_max - new_max) + tl.sum(tl.exp2(logits - new_max[:, None]), axis=1)
        row_max = new_max
    return row_max + tl.log2(row_sum)


@triton.jit(do_not_specialize=["heads", "first_head", "q_tokens", "k_tokens", "q_blocks", "k_blocks"])
def _linear_attention(
    q, sums, out, log2_mass, k_means, k_mean, unselected,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, out_stride_b, out_stride_h, out_stride_n, out_stride_d,
    mask_stride_h, mask_stride_m, heads, first_head, q_tokens, k_tokens, q_blocks, k_blocks, scale_log2,
    D: tl.constexpr, TILE: tl.constexpr, Q_BLOCK: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
    ESTIMATE: tl.constexpr, SMOOTHED: tl.constexpr,
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

    if ESTIMATE:
        mass = _unselected_log2_mass(
            queries, k_means + bh * k_blocks * D, unselected + bh * mask_stride_h + q_block * mask_stride_m,
            k_blocks, k_tokens, scale_log2, D, BLOCK, STEP,
        )  # fmt: skip
        if not SMOOTHED:
            # the means are of smoothed K, the loop's scores are not
            mass += tl.sum(wide * tl.load(k_mean + bh * D + d), axis=1) * scale_log2
        tl.store(log2_mass + bh * q_tokens + rows, mass, mask=rows < q_tokens)


def linear_attention(
    q, work, out, routed, log2_mass, heads_slice, k_tokens, *, scale_log2, smoothed, q_block, block, config, plan=None
):
    """Writes O_l into out (B, H, N, D) for the heads of ``heads_slice``, and the unselected log2 mass (B, H, N).

    log2_mass: None where the ratio is learned. smoothed: whether the sparse loop's scores are of smoothed K.
    """
    heads, tokens, head_dim = q.shape[1:]
    mask = routed.unselected
    grid = (block_count(tokens, config.tile_m), heads_slice.stop - heads_slice.start)
    launch(
        plan, _linear_attention, grid, q, work.query_sums, out, log2_mass, routed.k_means, routed.k_mean, mask, *q.stride(), *out.stride(),
        mask.stride(0), mask.stride(1), heads, heads_slice.start, tokens, k_tokens, mask.shape[1], mask.shape[2],
        scale_log2, D=head_dim, TILE=config.tile_m, Q_BLOCK=q_block, BLOCK=block, STEP=config.step,
        ESTIMATE=log2_mass is not None, SMOOTHED=smoothed,
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )  # fmt: skip
