"""Gradients of the linear branch: O_l = phi(Q) H / (phi(Q) Z) through dH_i, dZ_i and the features of Q and K.

_linear_queries: one program per (query tile, head): the linear branch's dQ, and per row what dH and the ratio need.
_linear_sums: one program per (query block, columns of H, head): dH_i and dZ_i in the place of H_i and Z_i.
_linear_keys: one program per (key tile, head), from the sums of dH_i and dZ_i over the query blocks that left key block
j out: the linear branch's dK (of the smoothed K) and dV, and dK's sum over the tile for smooth-k's mean.
H is read COLS columns at a time, so that float32 fits too. O_l does not change with the length of phi(Q), so the
projection term of softmax's gradient is zero for Q. Rows where O_l has no weight pass no gradient on.
"""

import triton
import triton.language as tl

from ..router import LEAST_LINEAR_WEIGHT, block_count

LEAST_WEIGHT = tl.constexpr(LEAST_LINEAR_WEIGHT)


@triton.jit
def _features(x):
    exponentials = tl.exp(x - tl.max(x, axis=1)[:, None])
    return exponentials / tl.sum(exponentials, axis=1)[:, None]


@triton.jit(do_not_specialize=["heads", "first_head", "tokens", "q_blocks"])
def _linear_queries(
    q, grad_out, grad_q, sums, row_ratio, row_delta, row_weight, row_product,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, g_stride_b, g_stride_h, g_stride_n, g_stride_d,
    out_stride_b, out_stride_h, out_stride_n, out_stride_d, heads, first_head, tokens, q_blocks,
    D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, Q_BLOCK: tl.constexpr,
):  # fmt: skip
    tile, slot = tl.program_id(0), tl.program_id(1).to(tl.int64)
    bh = first_head + slot
    b, h = bh // heads, bh % heads
    rows, d = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64), tl.arange(0, D)
    live = rows < tokens
    q_at = q + b * q_stride_b + h * q_stride_h + rows[:, None] * q_stride_n + d * q_stride_d
    g_at = grad_out + b * g_stride_b + h * g_stride_h + rows[:, None] * g_stride_n
    sums += (slot * q_blocks + tile * ROWS // Q_BLOCK) * ((D + 1) * D)
    z_sum = tl.load(sums + D * D + d).to(tl.float32)
    phi = _features(tl.load(q_at, mask=live[:, None], other=0.0).to(tl.float32))
    phi_low = phi.to(sums.dtype.element_ty)
    norm = tl.sum(phi_low.to(tl.float32) * z_sum, axis=1)

    product = tl.zeros([ROWS], dtype=tl.float32)
    dphi = tl.zeros([ROWS, D], dtype=tl.float32)
    for start in range(0, D, COLS):
        e = start + tl.arange(0, COLS)
        h_sum = tl.load(sums + d[:, None] * D + e)
        grad = tl.load(g_at + e * g_stride_d, mask=live[:, None], other=0.0)
        out = tl.dot(phi_low, h_sum, input_precision="tf32x3")
        product += tl.sum(grad.to(tl.float32) * out, axis=1)
        dphi = tl.dot(grad.to(h_sum.dtype), tl.trans(h_sum), dphi, input_precision="tf32x3")
    weightless = norm < LEAST_WEIGHT * tl.max(phi, axis=1)
    inverse = tl.where(weightless, 0.0, 1.0 / norm)
    row_at = bh * tokens + rows
    # without weight O_l counts as O_s, and the ratio gets no gradient
    product = tl.where(weightless, tl.load(row_delta + row_at, mask=live, other=0.0), product * inverse)
    weight = (1.0 - tl.load(row_ratio + row_at, mask=live, other=1.0)) * inverse
    tl.store(row_weight + row_at, weight, mask=live)
    tl.store(row_product + row_at, product, mask=live)
    dq = phi * (dphi - product[:, None] * z_sum[None, :]) * weight[:, None]
    out_at = grad_q + b * out_stride_b + h * out_stride_h + rows[:, None] * out_stride_n + d * out_stride_d
    tl.store(out_at, dq.to(grad_q.dtype.element_ty), mask=live[:, None])


@triton.jit(do_not_specialize=["heads", "first_head", "tokens"])
def _linear_sums(
    q, grad_out, sums, row_weight, row_product,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, g_stride_b, g_stride_h, g_stride_n, g_stride_d,
    heads, first_head, tokens,
    D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, Q_BLOCK: tl.constexpr,
):  # fmt: skip
    q_block, slot = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    bh = first_head + slot
    b, h = bh // heads, bh % heads
    d, e = tl.arange(0, D), tl.program_id(1) * COLS + tl.arange(0, COLS)
    q += b * q_stride_b + h * q_stride_h
    grad_out += b * g_stride_b + h * g_stride_h
    dh = tl.zeros([D, COLS], dtype=tl.float32)
    dz = tl.zeros([D], dtype=tl.float32)
    for start in range(0, Q_BLOCK, ROWS):
        rows = q_block * Q_BLOCK + start + tl.arange(0, ROWS)
        live = rows < tokens
        inside = live[:, None]
        phi = _features(tl.load(q + rows[:, None] * q_stride_n + d * q_stride_d, mask=inside, other=0.0).to(tl.float32))
        grad = tl.load(grad_out + rows[:, None] * g_stride_n + e * g_stride_d, mask=inside, other=0.0)
        weight = tl.load(row_weight + bh * tokens + rows, mask=live, other=0.0)
        product = tl.load(row_product + bh * tokens + rows, mask=live, other=0.0)
        weighted = (grad.to(tl.float32) * weight[:, None]).to(sums.dtype.element_ty)
        dh = tl.dot(tl.trans(phi.to(sums.dtype.element_ty)), weighted, dh, input_precision="tf32x3")
        dz -= tl.sum(phi * (product * weight)[:, None], axis=0)
    sums += (slot * tl.num_programs(0) + q_block) * ((D + 1) * D)
    tl.store(sums + d[:, None] * D + e, dh.to(sums.dtype.element_ty))
    if tl.program_id(1) == 0:
        tl.store(sums + D * D + d, dz.to(sums.dtype.element_ty))


@triton.jit(do_not_specialize=["heads", "first_head", "tokens", "blocks"])
def _linear_keys(
    k, v, k_mean, grad_k, grad_v, sums, tile_totals,
    k_stride_b, k_stride_h, k_stride_n, k_stride_d, v_stride_b, v_stride_h, v_stride_n, v_stride_d,
    gk_stride_b, gk_stride_h, gk_stride_n, gk_stride_d, gv_stride_b, gv_stride_h, gv_stride_n, gv_stride_d,
    heads, first_head, tokens, blocks, factor,
    D: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    tile, slot = tl.program_id(0), tl.program_id(1).to(tl.int64)
    bh = first_head + slot
    b, h = bh // heads, bh % heads
    keys, d = (tile * KEYS + tl.arange(0, KEYS)).to(tl.int64), tl.arange(0, D)
    inside = keys[:, None] < tokens
    k_at = k + b * k_stride_b + h * k_stride_h + keys[:, None] * k_stride_n + d * k_stride_d
    v_at = v + b * v_stride_b + h * v_stride_h + keys[:, None] * v_stride_n
    gv_at = grad_v + b * gv_stride_b + h * gv_stride_h + keys[:, None] * gv_stride_n
    sums += (slot * blocks + tile * KEYS // BLOCK) * ((D + 1) * D)
    mean = tl.load(k_mean + bh * D + d)
    phi = _features(tl.load(k_at, mask=inside, other=0.0).to(tl.float32) - mean)
    phi = tl.where(inside, phi, 0.0)
    phi_low = phi.to(sums.dtype.element_ty)

    dphi = tl.zeros([KEYS, D], dtype=tl.float32) + tl.load(sums + D * D + d).to(tl.float32)[None, :]
    for start in range(0, D, COLS):
        e = start + tl.arange(0, COLS)
        dh = tl.load(sums + d[:, None] * D + e)
        values = tl.load(v_at + e * v_stride_d, mask=inside, other=0.0)
        dphi = tl.dot(values.to(dh.dtype), tl.trans(dh), dphi, input_precision="tf32x3")
        dv = factor * tl.dot(phi_low, dh, input_precision="tf32x3")
        tl.store(gv_at + e * gv_stride_d, dv.to(grad_v.dtype.element_ty), mask=inside)
    dk = factor * phi * (dphi - tl.sum(phi * dphi, axis=1)[:, None])
    gk_at = grad_k + b * gk_stride_b + h * gk_stride_h + keys[:, None] * gk_stride_n + d * gk_stride_d
    tl.store(gk_at, dk.to(grad_k.dtype.element_ty), mask=inside)
    tl.store(tile_totals + (bh * tl.num_programs(0) + tile) * D + d, tl.sum(dk, axis=0))


def linear_queries(
    q, grad_out, grad_q, query_sums, row_ratio, row_delta, row_weight, row_product, heads_slice, *, q_block, config
):
    """Fills grad_q (B, H, N, D) for the heads of ``heads_slice``, and turns query_sums into its own gradient.

    query_sums: (G, T_m, (D + 1) * D), H_i and Z_i of the masked sum. row_ratio, and row_delta, rowsum(dO O_s): float32
    (B, H, N). Filled too, of the same shape: row_weight, (1 - alpha) / (phi(Q) Z), and row_product, rowsum(dO O_l); where
    O_l has no weight 0 and rowsum(dO O_s).
    """
    heads, tokens, head_dim = q.shape[1:]
    q_blocks, group = query_sums.shape[1], heads_slice.stop - heads_slice.start
    cols = min(config.cols, head_dim)
    shared = {"D": head_dim, "ROWS": config.rows, "COLS": cols, "Q_BLOCK": q_block, "num_warps": config.num_warps}
    _linear_queries[(block_count(tokens, config.rows), group)](
        q, grad_out, grad_q, query_sums, row_ratio, row_delta, row_weight, row_product,
        *q.stride(), *grad_out.stride(), *grad_q.stride(), heads, heads_slice.start, tokens, q_blocks,
        **shared, num_stages=config.num_stages,
    )  # fmt: skip
    _linear_sums[(q_blocks, head_dim // cols, group)](
        q, grad_out, query_sums, row_weight, row_product,
        *q.stride(), *grad_out.stride(), heads, heads_slice.start, tokens, **shared, num_stages=config.num_stages,
    )  # fmt: skip


def linear_keys(k, v, k_mean, grad_k, grad_v, sums, tile_totals, heads_slice, *, factor, block, config):
    """Fills grad_k, grad_v (B, H, M, D) and tile_totals (B * H, tiles, D) for the heads of ``heads_slice``.

    sums: (G, T_n, (D + 1) * D), the gradient of h_j and z_j up to ``factor``. k_mean: float32 (B * H, D). A tile is
    config.keys keys.
    """
    heads, tokens, head_dim = k.shape[1:]
    _linear_keys[(tile_totals.shape[1], heads_slice.stop - heads_slice.start)](
        k, v, k_mean, grad_k, grad_v, sums, tile_totals,
        *k.stride(), *v.stride(), *grad_k.stride(), *grad_v.stride(), heads, heads_slice.start, tokens, sums.shape[1],
        factor, D=head_dim, BLOCK=block, KEYS=config.keys, COLS=min(config.cols, head_dim),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
