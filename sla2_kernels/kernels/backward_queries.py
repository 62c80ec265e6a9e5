"""dQ of the sparse branch, added to what the linear branch left in dQ.

One program per (query tile, head) walks the blocks that the tile selected: dS = alpha P (dP - delta), dQ += dS K.
A row of dS sums to zero until it is rounded to 16 bit, and real keys share a large mean: what the rounded row still sums
to, times that mean, is subtracted again.
"""

import triton
import triton.language as tl

from ..router import block_count
from .launch import launch
from .numerics import NO_SCORE
from .tiles import KEY_BLOCK, QUERY_BLOCK, load_tile, plane_of, store_tile, tile_rows


@triton.jit(do_not_specialize=["heads", "q_tokens", "k_tokens", "count"])
def _query_gradient(
    q, k, v, grad_out, grad_q, selected, row_shift, row_delta, k_mean,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d, g_stride_b, g_stride_h, g_stride_n, g_stride_d,
    out_stride_b, out_stride_h, out_stride_n, out_stride_d,
    heads, q_tokens, k_tokens, count, scale_log2, scale,
    D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, LINEAR: tl.constexpr,
):  # fmt: skip
    tile, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows, d = tile_rows(tile, ROWS), tl.arange(0, D)
    inside, row_at = rows < q_tokens, bh * q_tokens + rows
    q_tile = load_tile(plane_of(q, bh, heads, q_stride_b, q_stride_h), rows, d, q_stride_n, q_stride_d, q_tokens)
    g_tile = load_tile(plane_of(grad_out, bh, heads, g_stride_b, g_stride_h), rows, d, g_stride_n, g_stride_d, q_tokens)
    shift = tl.load(row_shift + row_at, mask=inside, other=0.0)  # [ROWS]
    delta = tl.load(row_delta + row_at, mask=inside, other=0.0)  # [ROWS]
    k_plane = plane_of(k, bh, heads, k_stride_b, k_stride_h)
    v_plane = plane_of(v, bh, heads, v_stride_b, v_stride_h)
    selected += (bh * tl.cdiv(q_tokens, QUERY_BLOCK) + tile * ROWS // QUERY_BLOCK) * count

    acc = tl.zeros([ROWS, D], dtype=tl.float32)
    left_over = tl.zeros([ROWS], dtype=tl.float32)
    for step in range(0, count * (KEY_BLOCK // KEYS)):
        j = tl.load(selected + step // (KEY_BLOCK // KEYS)).to(tl.int64)
        keys = j * KEY_BLOCK + step % (KEY_BLOCK // KEYS) * KEYS + tl.arange(0, KEYS)
        k_tile = load_tile(k_plane, keys, d, k_stride_n, k_stride_d, k_tokens)  # [KEYS, D]
        v_tile = load_tile(v_plane, keys, d, v_stride_n, v_stride_d, k_tokens)  # [KEYS, D]
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="tf32x3")  # [ROWS, KEYS]
        dp = tl.dot(g_tile, tl.trans(v_tile), input_precision="tf32x3")  # [ROWS, KEYS]
        p = tl.exp2(tl.where((keys < k_tokens)[None, :], scores * scale_log2 - shift[:, None], NO_SCORE))
        ds = (p * (dp - delta[:, None])).to(k_tile.dtype)
        left_over += tl.sum(ds.to(tl.float32), axis=1)
        acc = tl.dot(ds, k_tile, acc, input_precision="tf32x3")  # [ROWS, D]

    total = (acc - left_over[:, None] * tl.load(k_mean + bh * D + d)[None, :]) * scale
    out_plane = plane_of(grad_q, bh, heads, out_stride_b, out_stride_h)
    if LINEAR:
        total += load_tile(out_plane, rows, d, out_stride_n, out_stride_d, q_tokens).to(tl.float32)
    store_tile(out_plane, rows, d, out_stride_n, out_stride_d, q_tokens, total)


def query_gradient(
    q, k, v, grad_out, grad_q, selected, row_shift, row_delta, k_mean, *, scale, scale_log2, linear, config
):
    """grad_q (B, H, N, D), any stride: the sparse branch's share, added to its content where ``linear``.

    Arguments as in row_statistics, which made row_shift and row_delta. k_mean: float32 (B * H, D).
    """
    batch, heads, tokens, head_dim = q.shape
    launch(
        _query_gradient, (block_count(tokens, config.rows), batch * heads),
        q, k, v, grad_out, grad_q, selected, row_shift, row_delta, k_mean,
        *q.stride(), *k.stride(), *v.stride(), *grad_out.stride(), *grad_q.stride(),
        heads, tokens, k.shape[2], selected.shape[2], scale_log2, scale,
        D=head_dim, ROWS=config.rows, KEYS=config.keys, LINEAR=linear, options=config.options,
    )  # fmt: skip
