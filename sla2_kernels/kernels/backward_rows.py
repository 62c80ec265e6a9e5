"""What the backward pass needs of each query row: its log-sum-exp over the selected keys, and rowsum(P dP).

One program per (query tile, head) walks the selected blocks once, in 16 bit whatever the forward's precision was, so that
P and its row sums agree with the gradients made from them. No output tile is kept: rowsum(dO_s O_s) = rowsum(P dP) with
dP = dO V^T, an online sum like the softmax's own. The ratio joins the log-sum-exp: alpha P = exp2(S - shift).
"""

import triton
import triton.language as tl

from ..router import block_count
from .launch import launch
from .numerics import NO_SCORE, softmax_step
from .tiles import KEY_BLOCK, QUERY_BLOCK, load_tile, plane_of, tile_rows

MIN_RATIO = tl.constexpr(1.0e-30)  # of a row that softmax attention has no part in: its log2 stays finite


@triton.jit(do_not_specialize=["heads", "q_tokens", "k_tokens", "count"])
def _row_statistics(
    q, k, v, grad_out, selected, ratio, row_shift, row_delta,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d, g_stride_b, g_stride_h, g_stride_n, g_stride_d,
    heads, q_tokens, k_tokens, count, scale_log2, D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    tile, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows, d = tile_rows(tile, ROWS), tl.arange(0, D)
    q_tile = load_tile(plane_of(q, bh, heads, q_stride_b, q_stride_h), rows, d, q_stride_n, q_stride_d, q_tokens)
    g_tile = load_tile(plane_of(grad_out, bh, heads, g_stride_b, g_stride_h), rows, d, g_stride_n, g_stride_d, q_tokens)
    k_plane = plane_of(k, bh, heads, k_stride_b, k_stride_h)
    v_plane = plane_of(v, bh, heads, v_stride_b, v_stride_h)
    selected += (bh * tl.cdiv(q_tokens, QUERY_BLOCK) + tile * ROWS // QUERY_BLOCK) * count

    row_max = tl.full([ROWS], NO_SCORE, dtype=tl.float32)
    row_sum = tl.zeros([ROWS], dtype=tl.float32)
    product_sum = tl.zeros([ROWS], dtype=tl.float32)
    for step in range(0, count * (KEY_BLOCK // KEYS)):
        j = tl.load(selected + step // (KEY_BLOCK // KEYS)).to(tl.int64)
        keys = j * KEY_BLOCK + step % (KEY_BLOCK // KEYS) * KEYS + tl.arange(0, KEYS)
        k_tile = load_tile(k_plane, keys, d, k_stride_n, k_stride_d, k_tokens)  # [KEYS, D]
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="tf32x3") * scale_log2  # [ROWS, KEYS]
        # twice: below the running maximum of rows that have met no key yet
        scores = tl.where((keys < k_tokens)[None, :], scores, 2 * NO_SCORE)
        v_tile = load_tile(v_plane, keys, d, v_stride_n, v_stride_d, k_tokens)  # [KEYS, D]
        dp = tl.dot(g_tile, tl.trans(v_tile), input_precision="tf32x3")  # [ROWS, KEYS]
        p, correction, row_max = softmax_step(scores, row_max)
        row_sum = row_sum * correction + tl.sum(p, axis=1)
        product_sum = product_sum * correction + tl.sum(p * dp, axis=1)

    inside, row_at = rows < q_tokens, bh * q_tokens + rows
    row_ratio = tl.load(ratio + row_at, mask=inside, other=1.0)
    shift = row_max + tl.log2(row_sum) - tl.log2(tl.maximum(row_ratio, MIN_RATIO))
    tl.store(row_shift + row_at, shift, mask=inside)
    tl.store(row_delta + row_at, product_sum / row_sum, mask=inside)


def row_statistics(q, k, v, grad_out, selected, ratio, row_shift, row_delta, *, scale_log2, config):
    """Fills row_shift and row_delta, float32 (B, H, N): log2 of sum exp(S) / alpha, and rowsum(P dP).

    q, grad_out: (B, H, N, D); k, v: (B, H, M, D); any stride. selected: int32 (B * H, T_m, n). ratio: (B, H, N).
    """
    batch, heads, tokens, head_dim = q.shape
    launch(
        _row_statistics, (block_count(tokens, config.rows), batch * heads),
        q, k, v, grad_out, selected, ratio, row_shift, row_delta,
        *q.stride(), *k.stride(), *v.stride(), *grad_out.stride(),
        heads, tokens, k.shape[2], selected.shape[2], scale_log2,
        D=head_dim, ROWS=config.rows, KEYS=config.keys, options=config.options,
    )  # fmt: skip
