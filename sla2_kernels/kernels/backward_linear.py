"""Gradients of the linear branch: O_l = phi(Q) H / (phi(Q) Z) through dH_i, dZ_i and the features of Q and K.

_linear_queries: one program per (query block, head): dH_i and dZ_i in the place of H_i and Z_i, the linear branch's dQ, and
the gradient of the ratio. O_l does not change with the length of phi(Q), so softmax's projection term is zero there.
_linear_keys: one program per (key block, head), from the sums of dH_i and dZ_i over the query blocks that left block j
out: the linear branch's dK (of the smoothed K) and dV, and dK's sum over the block for smooth-k's mean.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _features(x):
    exponentials = tl.exp(x - tl.max(x, axis=1)[:, None])
    return exponentials / tl.sum(exponentials, axis=1)[:, None]


@triton.jit
def _linear_queries(
    q, grad_out, grad_q, sums, row_ratio, row_delta, grad_ratio,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, g_stride_b, g_stride_h, g_stride_n, g_stride_d,
    out_stride_b, out_stride_h, out_stride_n, out_stride_d, heads, first_head, tokens,
    D: tl.constexpr, ROWS: tl.constexpr, Q_BLOCK: tl.constexpr,
):  # fmt: skip
    q_block, slot = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    bh = first_head + slot
    b, h = bh // heads, bh % heads
    d = tl.arange(0, D)
    q += b * q_stride_b + h * q_stride_h
    grad_out += b * g_stride_b + h * g_stride_h
    grad_q += b * out_stride_b + h * out_stride_h
    sums += (slot * tl.num_programs(0) + q_block) * ((D + 1) * D)
    h_at = sums + d[:, None] * D + d
    h_sum = tl.load(h_at)
    z_sum = tl.load(sums + D * D + d).to(tl.float32)

    dh = tl.zeros([D, D], dtype=tl.float32)
    dz = tl.zeros([D], dtype=tl.float32)
    dratio = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, Q_BLOCK, ROWS):
        rows = q_block * Q_BLOCK + start + tl.arange(0, ROWS)
        live = rows < tokens
        inside = live[:, None]
        wide = tl.load(q + rows[:, None] * q_stride_n + d * q_stride_d, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_out + rows[:, None] * g_stride_n + d * g_stride_d, mask=inside, other=0.0)
        phi = _features(wide)
        phi_low = phi.to(h_sum.dtype)
        norm = tl.sum(phi_low.to(tl.float32) * z_sum, axis=1)
        out = tl.dot(phi_low, h_sum, input_precision="tf32x3") / norm[:, None]
        product = tl.sum(grad.to(tl.float32) * out, axis=1)
        ratio = tl.load(row_ratio + bh * tokens + rows, mask=live, other=1.0)
        dratio += tl.load(row_delta + bh * tokens + rows, mask=live, other=0.0) - product

        weight = (1.0 - ratio) / norm
        dphi = tl.dot(grad.to(h_sum.dtype), tl.trans(h_sum), input_precision="tf32x3") - product[:, None] * z_sum[None, :]
        dq = phi * dphi * weight[:, None]
        tl.store(grad_q + rows[:, None] * out_stride_n + d * out_stride_d, dq.to(grad_q.dtype.element_ty), mask=inside)
        weighted = (grad.to(tl.float32) * weight[:, None]).to(h_sum.dtype)
        dh = tl.dot(tl.trans(phi_low), weighted, dh, input_precision="tf32x3")
        dz -= tl.sum(phi * (product * weight)[:, None], axis=0)

    tl.store(grad_ratio + bh * tl.num_programs(0) + q_block, tl.sum(dratio))
    # every thread has read H and Z by now, and dH and dZ take their place
    tl.debug_barrier()
    tl.store(h_at, dh.to(h_sum.dtype))
    tl.store(sums + D * D + d, dz.to(h_sum.dtype))


@triton.jit
def _linear_keys(
    k, v, k_mean, grad_k, grad_v, sums, block_totals,
    k_stride_b, k_stride_h, k_stride_n, k_stride_d, v_stride_b, v_stride_h, v_stride_n, v_stride_d,
    gk_stride_b, gk_stride_h, gk_stride_n, gk_stride_d, gv_stride_b, gv_stride_h, gv_stride_n, gv_stride_d,
    heads, first_head, tokens, factor,
    D: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    block, slot = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    bh = first_head + slot
    b, h = bh // heads, bh % heads
    d = tl.arange(0, D)
    k += b * k_stride_b + h * k_stride_h
    v += b * v_stride_b + h * v_stride_h
    grad_k += b * gk_stride_b + h * gk_stride_h
    grad_v += b * gv_stride_b + h * gv_stride_h
    mean = tl.load(k_mean + bh * D + d)
    sums += (slot * tl.num_programs(0) + block) * ((D + 1) * D)
    dh = tl.load(sums + d[:, None] * D + d)
    dz = tl.load(sums + D * D + d).to(tl.float32)

    total = tl.zeros([D], dtype=tl.float32)
    for start in range(0, BLOCK, KEYS):
        keys = block * BLOCK + start + tl.arange(0, KEYS)
        inside = keys[:, None] < tokens
        k_raw = tl.load(k + keys[:, None] * k_stride_n + d * k_stride_d, mask=inside, other=0.0).to(tl.float32)
        values = tl.load(v + keys[:, None] * v_stride_n + d * v_stride_d, mask=inside, other=0.0)
        phi = tl.where(inside, _features(k_raw - mean), 0.0)
        dphi = tl.dot(values.to(dh.dtype), tl.trans(dh), input_precision="tf32x3") + dz[None, :]
        dk = factor * phi * (dphi - tl.sum(phi * dphi, axis=1)[:, None])
        dv = factor * tl.dot(phi.to(dh.dtype), dh, input_precision="tf32x3")
        total += tl.sum(dk, axis=0)
        gk_at = grad_k + keys[:, None] * gk_stride_n + d * gk_stride_d
        gv_at = grad_v + keys[:, None] * gv_stride_n + d * gv_stride_d
        tl.store(gk_at, dk.to(grad_k.dtype.element_ty), mask=inside)
        tl.store(gv_at, dv.to(grad_v.dtype.element_ty), mask=inside)
    tl.store(block_totals + (bh * tl.num_programs(0) + block) * D + d, total)


def linear_queries(q, grad_out, grad_q, query_sums, row_ratio, row_delta, grad_ratio, heads_slice, *, q_block, config):
    """Fills grad_q (B, H, N, D) and grad_ratio (B * H, T_m) for the heads of ``heads_slice``; query_sums becomes its gradient.

    query_sums: (G, T_m, (D + 1) * D), H_i and Z_i of the masked sum. row_ratio, row_delta: float32 (B, H, N).
    """
    heads, tokens, head_dim = q.shape[1:]
    _linear_queries[(triton.cdiv(tokens, q_block), heads_slice.stop - heads_slice.start)](
        q, grad_out, grad_q, query_sums, row_ratio, row_delta, grad_ratio,
        *q.stride(), *grad_out.stride(), *grad_q.stride(), heads, heads_slice.start, tokens,
        D=head_dim, ROWS=config.rows, Q_BLOCK=q_block, num_warps=config.num_warps, num_stages=1,
    )  # fmt: skip


def linear_keys(k, v, k_mean, grad_k, grad_v, sums, block_totals, heads_slice, *, factor, block, config):
    """Fills grad_k, grad_v (B, H, M, D) and block_totals (B * H, T_n, D) for the heads of ``heads_slice``.

    sums: (G, T_n, (D + 1) * D), the gradient of h_j and z_j up to ``factor``. k_mean: float32 (B * H, D).
    """
    heads, tokens, head_dim = k.shape[1:]
    _linear_keys[(triton.cdiv(tokens, block), heads_slice.stop - heads_slice.start)](
        k, v, k_mean, grad_k, grad_v, sums, block_totals,
        *k.stride(), *v.stride(), *grad_k.stride(), *grad_v.stride(), heads, heads_slice.start, tokens, factor,
        D=head_dim, BLOCK=block, KEYS=config.keys, num_warps=config.num_warps, num_stages=1,
    )  # fmt: skip


def token_mean(block_totals, tokens):
    """Sum over blocks, (B * H, T_n, D), over the number of tokens: (B * H, D)."""
    return torch.sum(block_totals, dim=1) / tokens
