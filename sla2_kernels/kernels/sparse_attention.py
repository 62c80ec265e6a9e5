"""The sparse loop: softmax attention of one query tile over its selected key blocks, then the linear branch and the mix.

One program per (query tile, head). The loop is bound by the work per score, so the scores stay raw: the softmax scale,
log2(e), the quantisation scales and FP8's range factor are folded into the one multiply-add before exp2.

INT8 scores skip the int-to-float conversion: the INT32 accumulator starts at 0x4B400000, the bits of 12582912.0 whose
last mantissa bit is worth 1, so its bits read as float32 are 12582912 + S exactly while |S| < 2 ** 22.
V blocks are stored over powers of two: the exponent joins the scores (p V is what must fit FP8) and leaves the row sum.
"""

import triton
import triton.language as tl

from .fp8 import to_fp8

INT8_BIAS_BITS = tl.constexpr(0x4B400000)
INT8_BIAS = tl.constexpr(12582912.0)
P_LOG2_RANGE = tl.constexpr(8.0)  # P in [0, 1] times 2 ** 8: inside e4m3's 448
LOWEST = tl.constexpr(-1.0e30)  # a running maximum that no finite score undercuts, finite so that differences are


@triton.jit
def _quantize_queries(q, QK: tl.constexpr):
    """A query tile and its one scale: rounded to INT8 or FP8, or as it is."""
    if QK == "16bit":
        rounded, scale = q, 1.0
    else:
        wide = q.to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(wide)), 1e-20)
        if QK == "int8":
            scaled = wide * (127.0 / largest)
            rounded, scale = tl.where(scaled >= 0, scaled + 0.5, scaled - 0.5).to(tl.int8), largest / 127.0
        else:
            rounded, scale = to_fp8(wide * (448.0 / largest)), largest / 448.0
    return rounded, scale


@triton.jit
def _attend_block(
    j, q, q_scale, acc, row_max, row_sum, k_tiles, k_scales, v_tiles, v_exponents, k_stride_n, k_stride_d, v_stride_n,
    v_stride_d, tokens, D: tl.constexpr, BLOCK: tl.constexpr, QK: tl.constexpr, PV: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One key block of the online softmax. MASKED: the block may be ragged."""
    in_block, d = tl.arange(0, BLOCK), tl.arange(0, D)
    rows = j * BLOCK + in_block
    live = rows < tokens
    if QK == "16bit":
        k_at = k_tiles + rows[None, :] * k_stride_n + d[:, None] * k_stride_d
        k = tl.load(k_at, mask=live[None, :], other=0.0) if MASKED else tl.load(k_at)
        scores = tl.dot(q, k, input_precision="tf32x3")
        factor = q_scale
        bias = 0.0
    else:
        k = tl.load(k_tiles + j * (BLOCK * D) + in_block[None, :] * D + d[:, None])
        factor = q_scale * tl.load(k_scales + j)
        if QK == "int8":
            start = tl.full([q.shape[0], BLOCK], INT8_BIAS_BITS, dtype=tl.int32)
            scores = tl.dot(q, k, acc=start, out_dtype=tl.int32).to(tl.float32, bitcast=True)
            bias = INT8_BIAS
        else:
            scores = tl.dot(q, k)
            bias = 0.0

    if PV == "fp8":
        shift = tl.load(v_exponents + j)
        log2_range = P_LOG2_RANGE
    else:
        shift = 0.0
        log2_range = 0.0
    highest = tl.max(tl.where(live[None, :], scores, LOWEST) if MASKED else scores, axis=1)
    new_max = tl.maximum(row_max, (highest - bias) * factor + shift)
    p = tl.exp2(scores * factor - (bias * factor + new_max - shift - log2_range)[:, None])
    if MASKED:
        p = tl.where(live[None, :], p, 0.0)
    correction = tl.exp2(row_max - new_max)
    row_sum = row_sum * correction + tl.sum(p, axis=1) * tl.exp2(-shift)
    acc = acc * correction[:, None]
    if PV == "fp8":
        v = tl.load(v_tiles + j * (BLOCK * D) + in_block[:, None] + d[None, :] * BLOCK)
        acc = tl.dot(to_fp8(p), v, acc)
    else:
        v_at = v_tiles + rows[:, None] * v_stride_n + d[None, :] * v_stride_d
        v = tl.load(v_at, mask=live[:, None], other=0.0) if MASKED else tl.load(v_at)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="tf32x3" if QK == "16bit" else "tf32")
    return acc, new_max, row_sum


@triton.jit
def _unselected_log2_mass(
    q, k_pooled, unselected, blocks, tokens, scale_log2, D: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """log2 of sum over unselected blocks of n_j exp(q . mean(K_j) * scale), per row; q is the tile as loaded."""
    d = tl.arange(0, D)
    row_max = tl.full([q.shape[0]], LOWEST, dtype=tl.float32)
    row_sum = tl.zeros([q.shape[0]], dtype=tl.float32)
    for start in tl.range(0, blocks, BLOCK, num_stages=2):
        j = start + tl.arange(0, BLOCK)
        means = tl.load(k_pooled + j[None, :] * D + d[:, None], mask=j[None, :] < blocks, other=0.0)
        counted = tl.load(unselected + j, mask=j < blocks, other=0.0) > 0
        live = tl.maximum(tl.minimum(tokens - j * BLOCK, BLOCK), 1).to(tl.float32)
        logits = tl.dot(q, means.to(q.dtype), input_precision="tf32x3") * scale_log2 + tl.log2(live)[None, :]
        logits = tl.where(counted[None, :], logits, LOWEST * 2)
        new_max = tl.maximum(row_max, tl.max(logits, axis=1))
        row_sum = row_sum * tl.exp2(row_max - new_max) + tl.sum(tl.exp2(logits - new_max[:, None]), axis=1)
        row_max = new_max
    return row_max + tl.log2(row_sum)


@triton.jit
def _linear_attention(q, h_at, D: tl.constexpr):
    """O_l = phi(Q) H / (phi(Q) Z) of one query tile; h_at points at H (D, D), Z is the row behind it."""
    d = tl.arange(0, D)
    wide = q.to(tl.float32)
    # phi's own denominator cancels between numerator and normaliser
    exponentials = tl.exp(wide - tl.max(wide, axis=1)[:, None])
    norm = tl.sum(exponentials * tl.load(h_at + D * D + d).to(tl.float32), axis=1)
    h = tl.load(h_at + d[:, None] * D + d)
    return tl.dot(exponentials.to(h.dtype), h, input_precision="tf32x3") / norm[:, None]


@triton.jit(
    do_not_specialize=["heads", "first_head", "q_tokens", "k_tokens", "q_blocks", "k_blocks", "count"]
)  # none of them may cost a user a compilation when frames, sparsity or head groups change
def _sparse_attention(
    q, k, v, out, k_low, k_scale, v_low, v_exponent, sums, selected, unselected, ratios, k_pooled, k_mean, row_ratio,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d, out_stride_b, out_stride_h, out_stride_n, out_stride_d,
    mask_stride_h, mask_stride_m, heads, first_head, q_tokens, k_tokens, q_blocks, k_blocks, count, scale_log2,
    D: tl.constexpr, TILE: tl.constexpr, Q_BLOCK: tl.constexpr, BLOCK: tl.constexpr, QK: tl.constexpr, PV: tl.constexpr,
    LINEAR: tl.constexpr, ESTIMATE: tl.constexpr,
):  # fmt: skip
    tile, slot = tl.program_id(0), tl.program_id(1).to(tl.int64)
    bh = first_head + slot
    q_block = tile * TILE // Q_BLOCK
    rows, d = tile * TILE + tl.arange(0, TILE), tl.arange(0, D)
    inside = rows[:, None] < q_tokens
    rows_long = rows.to(tl.int64)
    q_at = q + bh // heads * q_stride_b + bh % heads * q_stride_h + rows_long[:, None] * q_stride_n + d * q_stride_d
    out_at = out + bh // heads * out_stride_b + bh % heads * out_stride_h
    out_at += rows_long[:, None] * out_stride_n + d * out_stride_d

    unselected_mass = tl.zeros([TILE], dtype=tl.float32)
    if LINEAR:
        # O_l waits in the output until the mix: kept in registers through the loop, it would spill
        queries = tl.load(q_at, mask=inside, other=0.0)
        h_at = sums + (slot * q_blocks + q_block) * ((D + 1) * D)
        tl.store(out_at, _linear_attention(queries, h_at, D).to(out.dtype.element_ty), mask=inside)
        if ESTIMATE:
            unselected_mass = _unselected_log2_mass(
                queries, k_pooled + bh * k_blocks * D, unselected + bh * mask_stride_h + q_block * mask_stride_m,
                k_blocks, k_tokens, scale_log2, D, BLOCK,
            )  # fmt: skip
            if QK == "16bit":
                # the loop reads K as it is, the mass above is of smoothed K
                wide = queries.to(tl.float32)
                unselected_mass += tl.sum(wide * tl.load(k_mean + bh * D + d), axis=1) * scale_log2

    q_tile, q_scale = _quantize_queries(tl.load(q_at, mask=inside, other=0.0), QK)
    q_scale = q_scale * scale_log2
    if QK == "16bit":
        k_tiles = k + bh // heads * k_stride_b + bh % heads * k_stride_h
    else:
        k_tiles = k_low + slot * k_blocks * (BLOCK * D)
        k_scale += slot * k_blocks
    if PV == "fp8":
        v_tiles = v_low + slot * k_blocks * (BLOCK * D)
        v_exponent += slot * k_blocks
    else:
        v_tiles = v + bh // heads * v_stride_b + bh % heads * v_stride_h

    acc = tl.zeros([TILE, D], dtype=tl.float32)
    row_max = tl.full([TILE], LOWEST, dtype=tl.float32)
    row_sum = tl.zeros([TILE], dtype=tl.float32)
    selected += (bh * q_blocks + q_block) * count
    for i in range(0, count - 1):
        j = tl.load(selected + i).to(tl.int64)
        acc, row_max, row_sum = _attend_block(
            j, q_tile, q_scale, acc, row_max, row_sum, k_tiles, k_scale, v_tiles, v_exponent,
            k_stride_n, k_stride_d, v_stride_n, v_stride_d, k_tokens, D, BLOCK, QK, PV, False,
        )  # fmt: skip
    # the list ascends, so only its last block can be the ragged one
    j = tl.load(selected + count - 1).to(tl.int64)
    acc, row_max, row_sum = _attend_block(
        j, q_tile, q_scale, acc, row_max, row_sum, k_tiles, k_scale, v_tiles, v_exponent,
        k_stride_n, k_stride_d, v_stride_n, v_stride_d, k_tokens, D, BLOCK, QK, PV, True,
    )  # fmt: skip

    ratio = tl.full([TILE], 1.0, dtype=tl.float32)
    if LINEAR:
        if ESTIMATE:
            mass = row_max + tl.log2(row_sum)
            if PV == "fp8":
                mass -= P_LOG2_RANGE
            ratio = 1.0 / (1.0 + tl.exp2(unselected_mass - mass))
        else:
            ratio = ratio * tl.load(ratios + bh % heads * q_blocks + q_block)
        acc = acc * (ratio / row_sum)[:, None]
        tl.debug_barrier()  # other threads of this program wrote what this one reads
        acc += tl.load(out_at, mask=inside, other=0.0).to(tl.float32) * (1.0 - ratio)[:, None]
    else:
        acc = acc / row_sum[:, None]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=inside)
    tl.store(row_ratio + bh * q_tokens + rows, ratio, mask=rows < q_tokens)


def sparse_attention(
    q, k, v, out, work, routed, ratios, row_ratio, heads_slice, *, scale_log2, qk, pv, q_block, block, config
):
    """Writes out (B, H, N, D) and row_ratio (B, H, N) for the heads of ``heads_slice``.

    work: the packed key blocks (Workspace). routed: selection, mask, pools (Routing). ratios: (H, T_m) or None.
    """
    heads, tokens, head_dim = q.shape[1:]
    q_blocks, count = routed.selected.shape[1:]
    mask = routed.unselected
    linear = work.query_sums is not None
    grid = (triton.cdiv(tokens, config.tile_m), heads_slice.stop - heads_slice.start)
    _sparse_attention[grid](
        q, k, v, out, work.k_low, work.k_scale, work.v_low, work.v_exponent, work.query_sums, routed.selected, mask,
        ratios, routed.k_pooled, routed.k_mean, row_ratio,
        *q.stride(), *k.stride(), *v.stride(), *out.stride(),
        mask.stride(0) if linear else 0, mask.stride(1) if linear else 0,
        heads, heads_slice.start, tokens, k.shape[2], q_blocks, triton.cdiv(k.shape[2], block), count, scale_log2,
        D=head_dim, TILE=config.tile_m, Q_BLOCK=q_block, BLOCK=block, QK=qk, PV=pv, LINEAR=linear,
        ESTIMATE=ratios is None, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
