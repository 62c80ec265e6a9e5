"""dQ of the sparse branch, added to what the linear branch left in dQ.

One program per (query tile, head) walks the blocks that the tile selected: dS = alpha P (dP - delta), dQ += dS K.
A row of dS sums to zero, but not once it is rounded to 16 bit, and real keys share a large mean: what the rounded row
still sums to is taken back times that mean.
"""

import triton
import triton.language as tl

from ..router import block_count

LOWEST = tl.constexpr(-1.0e30)  # the exponent of a key past the end: its P is 0


@triton.jit(do_not_specialize=["heads", "q_tokens", "k_tokens", "q_blocks", "count"])
def _query_gradient(
    q, k, v, grad_out, grad_q, selected, row_shift, row_delta, k_mean,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d, g_stride_b, g_stride_h, g_stride_n, g_stride_d,
    out_stride_b, out_stride_h, out_stride_n, out_stride_d,
    heads, q_tokens, k_tokens, q_blocks, count, scale_log2, scale,
    D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, Q_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
    LINEAR: tl.constexpr,
):  # fmt: skip
    tile, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    rows, d = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64), tl.arange(0, D)
    inside = rows[:, None] < q_tokens
    q_at = q + b * q_stride_b + h * q_stride_h + rows[:, None] * q_stride_n + d * q_stride_d
    g_at = grad_out + b * g_stride_b + h * g_stride_h + rows[:, None] * g_stride_n + d * g_stride_d
    q_tile = tl.load(q_at, mask=inside, other=0.0)
    g_tile = tl.load(g_at, mask=inside, other=0.0)
    shift = tl.load(row_shift + bh * q_tokens + rows, mask=rows < q_tokens, other=0.0)
    delta = tl.load(row_delta + bh * q_tokens + rows, mask=rows < q_tokens, other=0.0)
    k += b * k_stride_b + h * k_stride_h
    v += b * v_stride_b + h * v_stride_h
    selected += (bh * q_blocks + tile * ROWS // Q_BLOCK) * count

    acc = tl.zeros([ROWS, D], dtype=tl.float32)
    left_over = tl.zeros([ROWS], dtype=tl.float32)
    for step in range(0, count * (BLOCK // KEYS)):
        j = tl.load(selected + step // (BLOCK // KEYS)).to(tl.int64)
        keys = j * BLOCK + step % (BLOCK // KEYS) * KEYS + tl.arange(0, KEYS)
        live = keys < k_tokens
        k_tile = tl.load(k + keys[:, None] * k_stride_n + d * k_stride_d, mask=live[:, None], other=0.0)
        v_tile = tl.load(v + keys[:, None] * v_stride_n + d * v_stride_d, mask=live[:, None], other=0.0)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="tf32x3")
        dp = tl.dot(g_tile, tl.trans(v_tile), input_precision="tf32x3")
        p = tl.exp2(tl.where(live[None, :], scores * scale_log2 - shift[:, None], LOWEST))
        ds = (p * (dp - delta[:, None])).to(k_tile.dtype)
        left_over += tl.sum(ds.to(tl.float32), axis=1)
        acc = tl.dot(ds, k_tile, acc, input_precision="tf32x3")

    total = (acc - left_over[:, None] * tl.load(k_mean + bh * D + d)[None, :]) * scale
    out_at = grad_q + b * out_stride_b + h * out_stride_h + rows[:, None] * out_stride_n + d * out_stride_d
    if LINEAR:
        total += tl.load(out_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_at, total.to(grad_q.dtype.element_ty), mask=inside)


def query_gradient(
    q, k, v, grad_out, grad_q, selected, row_shift, row_delta, k_mean,
    *, scale, scale_log2, q_block, block, linear, config,
):  # fmt: skip
    """grad_q (B, H, N, D), any stride: the sparse branch's share, added to its content where ``linear``.

    Arguments as in row_statistics, which made row_shift and row_delta. k_mean: float32 (B * H, D).
    """
    batch, heads, tokens, head_dim = q.shape
    q_blocks, count = selected.shape[1:]
    _query_gradient[(block_count(tokens, config.rows), batch * heads)](
        q, k, v, grad_out, grad_q, selected, row_shift, row_delta, k_mean,
        *q.stride(), *k.stride(), *v.stride(), *grad_out.stride(), *grad_q.stride(),
        heads, tokens, k.shape[2], q_blocks, count, scale_log2, scale,
        D=head_dim, ROWS=config.rows, KEYS=config.keys, Q_BLOCK=q_block, BLOCK=block, LINEAR=linear,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
