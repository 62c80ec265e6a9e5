"""dK and dV of the sparse branch, added to what the linear branch left there, and the way back through smooth-k.

One program per (key tile, head) walks the query blocks that selected its key block, in ascending order, from a list:
no atomics, so repeats are bitwise equal. Softmax does not see K's mean, so only the linear branch's dK loses its own mean.
"""

import torch
import triton
import triton.language as tl

from ..router import block_count

NOTHING = tl.constexpr(1.0e30)  # the log-sum-exp of a row that is not there: its P is exp2(-1e30) = 0


def selecting_blocks(selected, key_blocks):
    """The transposed selection: which query blocks selected each key block.

    Args:
        selected: int32 (B * H, T_m, n), distinct key blocks per query block.

    Returns:
        query_blocks: int32 (B * H, T_m * n), ordered by key block, ascending within one.
        starts: int32 (B * H, T_n + 1): key block j's list is query_blocks[:, starts[j] : starts[j + 1]].
    """
    rows, count = selected.shape[1:]
    query_block = torch.arange(rows, dtype=torch.int64, device=selected.device)[:, None]
    # one number per pair, all different: any sort gives the same order
    pairs = (selected.long() * rows + query_block).flatten(1).sort(dim=1).values
    bounds = torch.arange(key_blocks + 1, dtype=torch.int64, device=selected.device) * rows
    starts = torch.searchsorted(pairs, bounds.expand(len(pairs), -1).contiguous())
    return (pairs % rows).to(torch.int32), starts.to(torch.int32)


@triton.jit(do_not_specialize=["heads", "q_tokens", "k_tokens", "k_blocks", "pairs"])
def _key_gradient(
    q, k, v, grad_out, grad_k, grad_v, query_blocks, starts, row_shift, row_delta, k_correction,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d, g_stride_b, g_stride_h, g_stride_n, g_stride_d,
    gk_stride_b, gk_stride_h, gk_stride_n, gk_stride_d, gv_stride_b, gv_stride_h, gv_stride_n, gv_stride_d,
    heads, q_tokens, k_tokens, k_blocks, pairs, scale_log2, scale,
    D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, Q_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
    LINEAR: tl.constexpr,
):  # fmt: skip
    tile, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    keys, d = (tile * KEYS + tl.arange(0, KEYS)).to(tl.int64), tl.arange(0, D)
    inside = keys[:, None] < k_tokens
    k_at = k + b * k_stride_b + h * k_stride_h + keys[:, None] * k_stride_n + d * k_stride_d
    v_at = v + b * v_stride_b + h * v_stride_h + keys[:, None] * v_stride_n + d * v_stride_d
    k_tile = tl.load(k_at, mask=inside, other=0.0)
    v_tile = tl.load(v_at, mask=inside, other=0.0)
    q += b * q_stride_b + h * q_stride_h
    grad_out += b * g_stride_b + h * g_stride_h
    row_shift += bh * q_tokens
    row_delta += bh * q_tokens
    query_blocks += bh * pairs
    starts += bh * (k_blocks + 1) + tile * KEYS // BLOCK
    first, end = tl.load(starts), tl.load(starts + 1)

    dk = tl.zeros([KEYS, D], dtype=tl.float32)
    dv = tl.zeros([KEYS, D], dtype=tl.float32)
    for step in range(first * (Q_BLOCK // ROWS), end * (Q_BLOCK // ROWS)):
        i = tl.load(query_blocks + step // (Q_BLOCK // ROWS)).to(tl.int64)
        rows = i * Q_BLOCK + step % (Q_BLOCK // ROWS) * ROWS + tl.arange(0, ROWS)
        live = rows < q_tokens
        q_tile = tl.load(q + rows[:, None] * q_stride_n + d * q_stride_d, mask=live[:, None], other=0.0)
        g_tile = tl.load(grad_out + rows[:, None] * g_stride_n + d * g_stride_d, mask=live[:, None], other=0.0)
        shift = tl.load(row_shift + rows, mask=live, other=NOTHING)
        delta = tl.load(row_delta + rows, mask=live, other=0.0)
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="tf32x3")
        p = tl.exp2(scores * scale_log2 - shift[None, :])
        dv = tl.dot(p.to(g_tile.dtype), g_tile, dv, input_precision="tf32x3")
        dp = tl.dot(v_tile, tl.trans(g_tile), input_precision="tf32x3")
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="tf32x3")

    dk *= scale
    gk_at = grad_k + b * gk_stride_b + h * gk_stride_h + keys[:, None] * gk_stride_n + d * gk_stride_d
    gv_at = grad_v + b * gv_stride_b + h * gv_stride_h + keys[:, None] * gv_stride_n + d * gv_stride_d
    if LINEAR:
        dk += tl.load(gk_at, mask=inside, other=0.0).to(tl.float32) - tl.load(k_correction + bh * D + d)[None, :]
        dv += tl.load(gv_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(gk_at, dk.to(grad_k.dtype.element_ty), mask=inside)
    tl.store(gv_at, dv.to(grad_v.dtype.element_ty), mask=inside)


def key_gradients(
    q, k, v, grad_out, grad_k, grad_v, transposed, row_shift, row_delta, k_correction,
    *, scale, scale_log2, q_block, block, config,
):  # fmt: skip
    """grad_k and grad_v (B, H, M, D), any stride: the sparse branch's share.

    transposed: what selecting_blocks() returns. k_correction: float32 (B * H, D), the mean over tokens of the linear
    branch's dK, whose dK and dV grad_k and grad_v hold then; None where there is no linear branch.
    """
    batch, heads, tokens, head_dim = k.shape
    query_blocks, starts = transposed
    _key_gradient[(block_count(tokens, config.keys), batch * heads)](
        q, k, v, grad_out, grad_k, grad_v, query_blocks, starts, row_shift, row_delta, k_correction,
        *q.stride(), *k.stride(), *v.stride(), *grad_out.stride(), *grad_k.stride(), *grad_v.stride(),
        heads, q.shape[2], tokens, block_count(tokens, block), query_blocks.shape[1], scale_log2, scale,
        D=head_dim, ROWS=config.rows, KEYS=config.keys, Q_BLOCK=q_block, BLOCK=block,
        LINEAR=k_correction is not None, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
