"""dQ of the sparse branch, and what the rest of the backward pass needs of each query row: one walk over its key blocks.

One program per (query tile, head). dS = P (dP - delta) with delta = rowsum(P dP), which is known only after the last
block, like the softmax's denominator. So both are running values: beside the sum of dS K so far the walk keeps that of
P K, with which a new delta, like a new maximum, is brought to what was summed with the one before. delta converges within
a few blocks, so that dS is rounded to 16 bit after the subtraction, where it is small, and not before.

Everything is in 16 bit, whatever the forward's precision was, so that P and its row sums agree with the gradients made
from them; nothing of the forward is kept. A row of dS sums to zero until it is rounded, and real keys share a large mean:
what the rounded row still sums to, times that mean, is subtracted again.
"""

import triton
import triton.language as tl

from ..router import block_count
from .launch import launch
from .numerics import NO_SCORE, softmax_step
from .planes import KEY_BLOCK, load_tile, plane_of, store_tile, tile_rows

MIN_RATIO = tl.constexpr(1.0e-30)  # of a row that softmax attention has no part in: its log2 stays finite


@triton.jit(do_not_specialize=["heads", "q_tokens", "k_tokens", "count"])
def _query_gradient(
    q, k, v, grad_out, grad_q, selected, ratio, row_shift, row_delta, k_mean,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d, g_stride_b, g_stride_h, g_stride_n, g_stride_d,
    out_stride_b, out_stride_h, out_stride_n, out_stride_d,
    heads, q_tokens, k_tokens, count, scale_log2, scale,
    D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, QUERY_BLOCK: tl.constexpr,
):  # fmt: skip
    tile, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows, d = tile_rows(tile, ROWS), tl.arange(0, D)
    q_tile = load_tile(plane_of(q, bh, heads, q_stride_b, q_stride_h), rows, d, q_stride_n, q_stride_d, q_tokens)
    g_tile = load_tile(plane_of(grad_out, bh, heads, g_stride_b, g_stride_h), rows, d, g_stride_n, g_stride_d, q_tokens)
    k_plane = plane_of(k, bh, heads, k_stride_b, k_stride_h)
    v_plane = plane_of(v, bh, heads, v_stride_b, v_stride_h)
    selected += (bh * tl.cdiv(q_tokens, QUERY_BLOCK) + tile * ROWS // QUERY_BLOCK) * count

    ds_k, p_k = tl.zeros([ROWS, D], dtype=tl.float32), tl.zeros([ROWS, D], dtype=tl.float32)
    ds_sum, p_sum = tl.zeros([ROWS], dtype=tl.float32), tl.zeros([ROWS], dtype=tl.float32)
    row_sum, product_sum = tl.zeros([ROWS], dtype=tl.float32), tl.zeros([ROWS], dtype=tl.float32)
    row_max = tl.full([ROWS], NO_SCORE, dtype=tl.float32)
    delta = tl.zeros([ROWS], dtype=tl.float32)
    for step in range(0, count * (KEY_BLOCK // KEYS)):
        j = tl.load(selected + step // (KEY_BLOCK // KEYS)).to(tl.int64)
        keys = j * KEY_BLOCK + step % (KEY_BLOCK // KEYS) * KEYS + tl.arange(0, KEYS)
        k_tile = load_tile(k_plane, keys, d, k_stride_n, k_stride_d, k_tokens)  # [KEYS, D]
        v_tile = load_tile(v_plane, keys, d, v_stride_n, v_stride_d, k_tokens)  # [KEYS, D]
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="tf32x3")  # [ROWS, KEYS]
        dp = tl.dot(g_tile, tl.trans(v_tile), input_precision="tf32x3")  # [ROWS, KEYS]
        # twice: below the running maximum of rows that have met no key yet
        scores = tl.where((keys < k_tokens)[None, :], scores * scale_log2, 2 * NO_SCORE)
        p, correction, row_max = softmax_step(scores, row_max)
        row_sum = row_sum * correction + tl.sum(p, axis=1)
        product_sum = product_sum * correction + tl.sum(p * dp, axis=1)
        new_delta = product_sum / row_sum
        # what was summed with the old delta: each dS changes by P times delta's change
        change = (new_delta - delta) * correction
        delta = new_delta
        ds = (p * (dp - delta[:, None])).to(k_tile.dtype)
        p = p.to(k_tile.dtype)
        ds_sum = ds_sum * correction - change * p_sum + tl.sum(ds.to(tl.float32), axis=1)
        p_sum = p_sum * correction + tl.sum(p.to(tl.float32), axis=1)
        ds_k = ds_k * correction[:, None] - change[:, None] * p_k
        ds_k = tl.dot(ds, k_tile, ds_k, input_precision="tf32x3")  # [ROWS, D]
        p_k = tl.dot(p, k_tile, p_k * correction[:, None], input_precision="tf32x3")  # [ROWS, D]

    inside, row_at = rows < q_tokens, bh * q_tokens + rows
    row_ratio = tl.load(ratio + row_at, mask=inside, other=1.0)
    shift = row_max + tl.log2(row_sum) - tl.log2(tl.maximum(row_ratio, MIN_RATIO))
    tl.store(row_shift + row_at, shift, mask=inside)
    tl.store(row_delta + row_at, delta, mask=inside)
    dq = (ds_k - ds_sum[:, None] * tl.load(k_mean + bh * D + d)[None, :]) * (row_ratio * scale / row_sum)[:, None]
    store_tile(
        plane_of(grad_q, bh, heads, out_stride_b, out_stride_h), rows, d, out_stride_n, out_stride_d, q_tokens, dq
    )


def query_gradient(
    q, k, v, grad_out, grad_q, selected, ratio, row_shift, row_delta, k_mean,
    *, scale, scale_log2, query_block, config,
):  # fmt: skip
    """Fills grad_q (B, H, N, D) with the sparse branch's share, row_shift with log2 of sum exp(S) / alpha, and row_delta
    with rowsum(P dP), both float32 (B, H, N).

    q, grad_out: (B, H, N, D); k, v: (B, H, M, D); any stride. selected: int32 (B * H, T_m, n), ascending. ratio:
    (B, H, N). k_mean: float32 (B * H, D).
    """
    batch, heads, tokens, head_dim = q.shape
    launch(
        _query_gradient, (block_count(tokens, config.rows), batch * heads),
        q, k, v, grad_out, grad_q, selected, ratio, row_shift, row_delta, k_mean,
        *q.stride(), *k.stride(), *v.stride(), *grad_out.stride(), *grad_q.stride(),
        heads, tokens, k.shape[2], selected.shape[2], scale_log2, scale,
        D=head_dim, ROWS=config.rows, KEYS=config.keys, QUERY_BLOCK=query_block, options=config.options,
    )  # fmt: skip
