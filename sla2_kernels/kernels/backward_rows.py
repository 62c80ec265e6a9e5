"""What the backward pass needs of each query row: its log-sum-exp over the selected keys, and rowsum(P dP).

One program per (query tile, head) walks the selected blocks once, in 16 bit whatever the forward's precision was, so that
P and its row sums agree with the gradients made from them. No output tile is kept: rowsum(dO_s O_s) = rowsum(P dP) with
dP = dO V^T, an online sum like the softmax's own. The ratio joins the log-sum-exp: alpha P = exp2(S - shift).
"""

import triton
import triton.language as tl

from ..router import block_count

LOWEST = tl.constexpr(-1.0e30)  # a running maximum that no finite score undercuts, finite so that differences are
SMALLEST_RATIO = tl.constexpr(1.0e-30)


@triton.jit(do_not_specialize=["heads", "q_tokens", "k_tokens", "q_blocks", "count"])
def _row_statistics(
    q, k, v, grad_out, selected, row_ratio, row_shift, row_delta,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d, g_stride_b, g_stride_h, g_stride_n, g_stride_d,
    heads, q_tokens, k_tokens, q_blocks, count, scale_log2,
    D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, Q_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    rows, d = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64), tl.arange(0, D)
    inside = rows[:, None] < q_tokens
    q_at = q + b * q_stride_b + h * q_stride_h + rows[:, None] * q_stride_n + d * q_stride_d
    g_at = grad_out + b * g_stride_b + h * g_stride_h + rows[:, None] * g_stride_n + d * g_stride_d
    q_tile = tl.load(q_at, mask=inside, other=0.0)
    g_tile = tl.load(g_at, mask=inside, other=0.0)
    k += b * k_stride_b + h * k_stride_h
    v += b * v_stride_b + h * v_stride_h
    selected += (bh * q_blocks + tile * ROWS // Q_BLOCK) * count

    row_max = tl.full([ROWS], LOWEST, dtype=tl.float32)
    row_sum = tl.zeros([ROWS], dtype=tl.float32)
    product_sum = tl.zeros([ROWS], dtype=tl.float32)
    for step in range(0, count * (BLOCK // KEYS)):
        j = tl.load(selected + step // (BLOCK // KEYS)).to(tl.int64)
        keys = j * BLOCK + step % (BLOCK // KEYS) * KEYS + tl.arange(0, KEYS)
        live = keys < k_tokens
        k_tile = tl.load(k + keys[:, None] * k_stride_n + d * k_stride_d, mask=live[:, None], other=0.0)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="tf32x3") * scale_log2
        scores = tl.where(live[None, :], scores, 2 * LOWEST)
        v_tile = tl.load(v + keys[:, None] * v_stride_n + d * v_stride_d, mask=live[:, None], other=0.0)
        dp = tl.dot(g_tile, tl.trans(v_tile), input_precision="tf32x3")
        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        p = tl.exp2(scores - new_max[:, None])
        correction = tl.exp2(row_max - new_max)
        row_sum = row_sum * correction + tl.sum(p, axis=1)
        product_sum = product_sum * correction + tl.sum(p * dp, axis=1)
        row_max = new_max

    row_at = bh * q_tokens + rows
    ratio = tl.load(row_ratio + row_at, mask=rows < q_tokens, other=1.0)
    shift = row_max + tl.log2(row_sum) - tl.log2(tl.maximum(ratio, SMALLEST_RATIO))
    tl.store(row_shift + row_at, shift, mask=rows < q_tokens)
    tl.store(row_delta + row_at, product_sum / row_sum, mask=rows < q_tokens)


def row_statistics(q, k, v, grad_out, selected, row_ratio, row_shift, row_delta, *, scale_log2, q_block, block, config):
    """Fills row_shift and row_delta, float32 (B, H, N): log2 of sum exp(S) / alpha, and rowsum(P dP).

    q, grad_out: (B, H, N, D); k, v: (B, H, M, D); any stride. selected: int32 (B * H, T_m, n). row_ratio: (B, H, N).
    """
    batch, heads, tokens, head_dim = q.shape
    q_blocks, count = selected.shape[1:]
    _row_statistics[(block_count(tokens, config.rows), batch * heads)](
        q, k, v, grad_out, selected, row_ratio, row_shift, row_delta,
        *q.stride(), *k.stride(), *v.stride(), *grad_out.stride(),
        heads, tokens, k.shape[2], q_blocks, count, scale_log2,
        D=head_dim, ROWS=config.rows, KEYS=config.keys, Q_BLOCK=q_block, BLOCK=block,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
