"""Gradients of the linear branch: O_l = phi(Q) H / (phi(Q) Z) through dH_i, dZ_i and the features of Q and K.

_linear_queries: one program per (query tile, head): adds the linear branch's dQ; per row what dH and the ratio need.
_linear_sums: one program per (query block, columns of H, head): dH_i and dZ_i in the place of H_i and Z_i.
_linear_keys: one program per (key tile, head), from the sums of dH_i and dZ_i over the query blocks that left key block
j out: the linear branch's dK (of the smoothed K) and dV, and dK's sum over the tile for smooth-k's mean.
H is read COLS columns at a time, so that float32 fits too. O_l does not change with the length of phi(Q), so the
projection term of softmax's gradient is zero for Q. Rows where O_l has no weight pass no gradient on.
"""

import torch
import triton
import triton.language as tl

from ..router import block_count
from .launch import launch
from .numerics import MIN_LINEAR_WEIGHT, phi_numerator
from .planes import KEY_BLOCK, load_tile, plane_of, store_tile, tile_at, tile_rows


@triton.jit
def _phi(x):
    """softmax over the features [rows, D]."""
    exponentials = phi_numerator(x, 1)
    return exponentials / tl.sum(exponentials, axis=1)[:, None]


@triton.jit(do_not_specialize=["heads", "first_head", "tokens"])
def _linear_queries(
    q, grad_out, grad_q, sums, ratio, row_delta, row_weight, row_product,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, g_stride_b, g_stride_h, g_stride_n, g_stride_d,
    out_stride_b, out_stride_h, out_stride_n, out_stride_d, heads, first_head, tokens,
    D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, QUERY_BLOCK: tl.constexpr,
):  # fmt: skip
    tile, slot = tl.program_id(0), tl.program_id(1).to(tl.int64)
    bh = first_head + slot
    rows, d = tile_rows(tile, ROWS), tl.arange(0, D)
    inside, row_at = rows < tokens, bh * tokens + rows
    q_plane = plane_of(q, bh, heads, q_stride_b, q_stride_h)
    g_plane = plane_of(grad_out, bh, heads, g_stride_b, g_stride_h)
    sums += (slot * tl.cdiv(tokens, QUERY_BLOCK) + tile * ROWS // QUERY_BLOCK) * ((D + 1) * D)
    z_sum = tl.load(sums + D * D + d).to(tl.float32)  # [D]
    phi = _phi(load_tile(q_plane, rows, d, q_stride_n, q_stride_d, tokens).to(tl.float32))  # [ROWS, D]
    phi_low = phi.to(sums.dtype.element_ty)
    norm = tl.sum(phi_low.to(tl.float32) * z_sum, axis=1)

    product = tl.zeros([ROWS], dtype=tl.float32)
    dphi = tl.zeros([ROWS, D], dtype=tl.float32)
    for start in range(0, D, COLS):
        e = start + tl.arange(0, COLS)
        h_sum = tl.load(sums + d[:, None] * D + e)  # [D, COLS]
        grad = load_tile(g_plane, rows, e, g_stride_n, g_stride_d, tokens)  # [ROWS, COLS]
        out = tl.dot(phi_low, h_sum, input_precision="tf32x3")  # [ROWS, COLS]
        product += tl.sum(grad.to(tl.float32) * out, axis=1)
        dphi = tl.dot(grad.to(h_sum.dtype), tl.trans(h_sum), dphi, input_precision="tf32x3")  # [ROWS, D]
    weightless = norm < MIN_LINEAR_WEIGHT * tl.max(phi, axis=1)
    inverse = tl.where(weightless, 0.0, 1.0 / norm)
    # without weight O_l counts as O_s, and the ratio gets no gradient
    product = tl.where(weightless, tl.load(row_delta + row_at, mask=inside, other=0.0), product * inverse)
    weight = (1.0 - tl.load(ratio + row_at, mask=inside, other=1.0)) * inverse
    tl.store(row_weight + row_at, weight, mask=inside)
    tl.store(row_product + row_at, product, mask=inside)
    dq = phi * (dphi - product[:, None] * z_sum[None, :]) * weight[:, None]
    out_plane = plane_of(grad_q, bh, heads, out_stride_b, out_stride_h)
    dq += load_tile(out_plane, rows, d, out_stride_n, out_stride_d, tokens).to(tl.float32)
    store_tile(out_plane, rows, d, out_stride_n, out_stride_d, tokens, dq)


@triton.jit(do_not_specialize=["heads", "first_head", "tokens"])
def _linear_sums(
    q, grad_out, sums, row_weight, row_product,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, g_stride_b, g_stride_h, g_stride_n, g_stride_d,
    heads, first_head, tokens,
    D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, QUERY_BLOCK: tl.constexpr,
):  # fmt: skip
    q_block, slot = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    bh = first_head + slot
    d, e = tl.arange(0, D), tl.program_id(1) * COLS + tl.arange(0, COLS)
    q_plane = plane_of(q, bh, heads, q_stride_b, q_stride_h)
    g_plane = plane_of(grad_out, bh, heads, g_stride_b, g_stride_h)
    dh = tl.zeros([D, COLS], dtype=tl.float32)
    dz = tl.zeros([D], dtype=tl.float32)
    for start in range(0, QUERY_BLOCK, ROWS):
        rows = q_block * QUERY_BLOCK + start + tl.arange(0, ROWS)
        inside, row_at = rows < tokens, bh * tokens + rows
        phi = _phi(load_tile(q_plane, rows, d, q_stride_n, q_stride_d, tokens).to(tl.float32))  # [ROWS, D]
        grad = load_tile(g_plane, rows, e, g_stride_n, g_stride_d, tokens)  # [ROWS, COLS]
        weight = tl.load(row_weight + row_at, mask=inside, other=0.0)  # [ROWS]
        product = tl.load(row_product + row_at, mask=inside, other=0.0)  # [ROWS]
        weighted = (grad.to(tl.float32) * weight[:, None]).to(sums.dtype.element_ty)
        dh = tl.dot(tl.trans(phi.to(sums.dtype.element_ty)), weighted, dh, input_precision="tf32x3")  # [D, COLS]
        dz -= tl.sum(phi * (product * weight)[:, None], axis=0)
    sums += (slot * tl.num_programs(0) + q_block) * ((D + 1) * D)
    tl.store(sums + d[:, None] * D + e, dh.to(sums.dtype.element_ty))
    if tl.program_id(1) == 0:
        tl.store(sums + D * D + d, dz.to(sums.dtype.element_ty))


@triton.jit(do_not_specialize=["heads", "first_head", "tokens"])
def _linear_keys(
    k, v, k_mean, grad_k, grad_v, sums, tile_totals,
    k_stride_b, k_stride_h, k_stride_n, k_stride_d, v_stride_b, v_stride_h, v_stride_n, v_stride_d,
    gk_stride_b, gk_stride_h, gk_stride_n, gk_stride_d, gv_stride_b, gv_stride_h, gv_stride_n, gv_stride_d,
    heads, first_head, tokens, factor, D: tl.constexpr, KEYS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    tile, slot = tl.program_id(0), tl.program_id(1).to(tl.int64)
    bh = first_head + slot
    keys, d = tile_rows(tile, KEYS), tl.arange(0, D)
    k_plane = plane_of(k, bh, heads, k_stride_b, k_stride_h)
    inside = keys[:, None] < tokens
    v_at = plane_of(v, bh, heads, v_stride_b, v_stride_h) + keys[:, None] * v_stride_n
    gv_at = plane_of(grad_v, bh, heads, gv_stride_b, gv_stride_h) + keys[:, None] * gv_stride_n
    sums += (slot * tl.cdiv(tokens, KEY_BLOCK) + tile * KEYS // KEY_BLOCK) * ((D + 1) * D)
    mean = tl.load(k_mean + bh * D + d)  # [D]
    phi = _phi(load_tile(k_plane, keys, d, k_stride_n, k_stride_d, tokens).to(tl.float32) - mean)  # [KEYS, D]
    phi = tl.where(inside, phi, 0.0)
    phi_low = phi.to(sums.dtype.element_ty)

    dphi = tl.zeros([KEYS, D], dtype=tl.float32) + tl.load(sums + D * D + d).to(tl.float32)[None, :]
    for start in range(0, D, COLS):
        e = start + tl.arange(0, COLS)
        dh = tl.load(sums + d[:, None] * D + e)  # [D, COLS]
        values = tl.load(v_at + e * v_stride_d, mask=inside, other=0.0)  # [KEYS, COLS]
        dphi = tl.dot(values.to(dh.dtype), tl.trans(dh), dphi, input_precision="tf32x3")  # [KEYS, D]
        dv = factor * tl.dot(phi_low, dh, input_precision="tf32x3")  # [KEYS, COLS]
        tl.store(gv_at + e * gv_stride_d, dv.to(grad_v.dtype.element_ty), mask=inside)
    # softmax's gradient: the projection on phi goes
    dk = factor * phi * (dphi - tl.sum(phi * dphi, axis=1)[:, None])
    gk_at = tile_at(plane_of(grad_k, bh, heads, gk_stride_b, gk_stride_h), keys, d, gk_stride_n, gk_stride_d)
    tl.store(gk_at, dk.to(grad_k.dtype.element_ty), mask=inside)
    tl.store(tile_totals + (bh * tl.num_programs(0) + tile) * D + d, tl.sum(dk, axis=0))


def linear_queries(q, grad_out, grad_q, query_sums, ratio, row_delta, row_product, group, *, query_block, config):
    """Adds to grad_q (B, H, N, D) for the heads of slice ``group``, and turns query_sums into its own gradient.

    query_sums: (G, T_m, (D + 1) * D), H_i and Z_i of the masked sum. ratio, and row_delta, rowsum(dO O_s): float32
    (B, H, N). Filled too, of the same shape: row_product, rowsum(dO O_l), or rowsum(dO O_s) where O_l has no weight.
    """
    heads, tokens, head_dim = q.shape[1:]
    q_blocks, slots = query_sums.shape[1], group.stop - group.start
    cols = min(config.cols, head_dim)
    row_weight = torch.empty_like(row_product)  # (1 - alpha) / (phi(Q) Z), 0 where O_l has no weight
    tiles = {"D": head_dim, "ROWS": config.rows, "COLS": cols, "QUERY_BLOCK": query_block}
    launch(
        _linear_queries, (block_count(tokens, config.rows), slots),
        q, grad_out, grad_q, query_sums, ratio, row_delta, row_weight, row_product,
        *q.stride(), *grad_out.stride(), *grad_q.stride(), heads, group.start, tokens, **tiles, options=config.options,
    )  # fmt: skip
    launch(
        _linear_sums, (q_blocks, head_dim // cols, slots), q, grad_out, query_sums, row_weight, row_product,
        *q.stride(), *grad_out.stride(), heads, group.start, tokens, **tiles, options=config.options,
    )  # fmt: skip


def linear_keys(k, v, k_mean, grad_k, grad_v, sums, tile_totals, group, *, factor, config):
    """Fills grad_k, grad_v (B, H, M, D) and tile_totals (B * H, tiles, D) for the heads of slice ``group``.

    sums: (G, T_n, (D + 1) * D), the gradient of h_j and z_j up to ``factor``. k_mean: float32 (B * H, D). A tile is
    config.keys keys.
    """
    heads, tokens, head_dim = k.shape[1:]
    launch(
        _linear_keys, (tile_totals.shape[1], group.stop - group.start), k, v, k_mean, grad_k, grad_v, sums, tile_totals,
        *k.stride(), *v.stride(), *grad_k.stride(), *grad_v.stride(), heads, group.start, tokens, factor,
        D=head_dim, KEYS=config.keys, COLS=min(config.cols, head_dim), options=config.options,
    )  # fmt: skip
