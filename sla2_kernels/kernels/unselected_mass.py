"""The attention mass that the linear branch stands for, estimated from block means where no ratio was learned.

Per query row the log2 of sum over unselected blocks of n_j exp(q . mean(K_j) * scale): what the ratio weighs against the
selected blocks' exact mass. The running maximum is over all blocks, so that a score takes one multiply-add, one
exponential and one multiply-add with n_j, which is 0 where the block is selected. Where every unselected block lies
more than 2^126 below the maximum the mass is 0, its log2 minus infinity and the ratio 1.
"""

import triton
import triton.language as tl

from ..router import block_count
from .launch import launch
from .numerics import NO_SCORE
from .planes import load_tile, plane_of, tile_rows, valid_rows


@triton.jit(do_not_specialize=["heads", "q_tokens", "k_tokens", "k_blocks"])
def _unselected_mass(
    q, k_means, k_mean, unselected, log2_mass,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, mask_stride_h, mask_stride_m,
    heads, q_tokens, k_tokens, k_blocks, scale_log2,
    D: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, QUERY_BLOCK: tl.constexpr, SMOOTHED: tl.constexpr,
):  # fmt: skip
    tile, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows, d = tile_rows(tile, TILE), tl.arange(0, D)
    q_plane = plane_of(q, bh, heads, q_stride_b, q_stride_h)
    queries = load_tile(q_plane, rows, d, q_stride_n, q_stride_d, q_tokens)  # [TILE, D]
    k_means += bh * k_blocks * D
    unselected += bh * mask_stride_h + tile * TILE // QUERY_BLOCK * mask_stride_m

    row_max = tl.full([TILE], NO_SCORE, dtype=tl.float32)
    row_sum = tl.zeros([TILE], dtype=tl.float32)
    for start in range(0, k_blocks, STEP):
        j = start + tl.arange(0, STEP)
        # past the last block that block is read again, with weight 0: zeros there could be the maximum
        at = tl.minimum(j, k_blocks - 1)
        means = tl.load(k_means + at[None, :] * D + d[:, None])  # [D, STEP]
        kept = tl.load(unselected + j, mask=j < k_blocks, other=0.0).to(tl.float32)
        weight = kept * valid_rows(j, k_tokens)  # [STEP]
        scores = tl.dot(queries, means, input_precision="tf32x3")  # [TILE, STEP]
        # the scale is applied twice: to the maxima, and in the multiply-add before exp2
        new_max = tl.maximum(row_max, tl.max(scores, axis=1) * scale_log2)
        p = tl.exp2(scores * scale_log2 - new_max[:, None])
        row_sum = row_sum * tl.exp2(row_max - new_max) + tl.sum(p * weight[None, :], axis=1)
        row_max = new_max
    mass = row_max + tl.log2(row_sum)
    if not SMOOTHED:
        # the means are of smoothed K, the loop's scores are not
        mass += tl.sum(queries.to(tl.float32) * tl.load(k_mean + bh * D + d), axis=1) * scale_log2
    tl.store(log2_mass + bh * q_tokens + rows, mass, mask=rows < q_tokens)


def unselected_mass(q, routed, log2_mass, k_tokens, query_block, *, scale_log2, smoothed, config):
    """Writes log2_mass, float32 (B, H, N), of q (B, H, N, D), any stride; scale_log2 above 0.

    routed: a Routing. smoothed: whether the sparse loop's scores are of smoothed K.
    """
    batch, heads, tokens, head_dim = q.shape
    mask = routed.unselected
    launch(
        _unselected_mass, (block_count(tokens, config.tile_m), batch * heads),
        q, routed.k_means, routed.k_mean, mask, log2_mass, *q.stride(), mask.stride(0), mask.stride(1),
        heads, tokens, k_tokens, mask.shape[2], scale_log2,
        D=head_dim, TILE=config.tile_m, STEP=config.step, QUERY_BLOCK=query_block, SMOOTHED=smoothed, options=config.options,
    )  # fmt: skip
