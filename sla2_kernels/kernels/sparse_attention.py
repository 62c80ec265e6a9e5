"""The sparse loop: softmax attention of one query tile over its selected key blocks, then the mix with the linear branch.

One program per (query tile, head). The loop is bound by the work per score, so the scores stay raw: the softmax scale,
log2(e), the quantisation scales and FP8's range factor are folded into the one multiply-add before exp2.

INT8 scores S become float32 before they meet a factor. Hopper has an instruction for it, which costs no more than setting
each accumulator to its start value. Other cards keep that start value in registers that are set once: the INT32
accumulator starts at 0x4B400000, the bits of 12582912.0, whose last mantissa bit is worth 1, so that its bits read as
float32 are 12582912 + S exactly while |S| < 2^22. The block's maximum is subtracted before the multiply-add, and the bias
with it: left to the multiply-add, the product 12582912 * factor would be rounded, at logits of 1e4 to whole powers of two
of P.
V blocks are stored over powers of two: the exponent joins the scores (p V is what must fit FP8) and leaves the row sum.
"""

import triton
import triton.language as tl

from ..router import block_count
from .launch import launch
from .numerics import FP8_MAX, INT8_BIAS, INT8_BIAS_BITS, INT8_MAX, MIN_MAGNITUDE, NO_SCORE, P_LOG2_RANGE, to_fp8
from .planes import KEY_BLOCK, load_tile, plane_of, tile_at, tile_rows


@triton.jit
def _quantize_queries(q, balance, QK: tl.constexpr):
    """A query tile in the format of Q K^T, and its one scale. balance: what INT8's channels are multiplied with first."""
    if QK == "16bit":
        rounded, scale = q, 1.0
    else:
        wide = q.to(tl.float32)
        if QK == "int8":
            wide *= tl.load(balance + tl.arange(0, q.shape[1]))[None, :]
        largest = tl.maximum(tl.max(tl.abs(wide)), MIN_MAGNITUDE)
        if QK == "int8":
            scaled = wide * (INT8_MAX / largest)
            # the conversion cuts off what is behind the point
            rounded, scale = tl.where(scaled >= 0, scaled + 0.5, scaled - 0.5).to(tl.int8), largest / INT8_MAX
        else:
            rounded, scale = to_fp8(wide * (FP8_MAX / largest)), largest / FP8_MAX
    return rounded, scale


@triton.jit
def _key_block_at(k, j, stride_n, stride_d, D: tl.constexpr, QK: tl.constexpr):
    """Addresses of key block j, transposed [D, KEY_BLOCK]. k: K's plane, or its packed blocks."""
    key, d = tl.arange(0, KEY_BLOCK), tl.arange(0, D)
    if QK == "16bit":
        at = k + (j * KEY_BLOCK + key)[None, :] * stride_n + d[:, None] * stride_d
    else:
        at = k + j * (KEY_BLOCK * D) + key[None, :] * D + d[:, None]
    return at


@triton.jit
def _value_block_at(v, j, stride_n, stride_d, D: tl.constexpr, PV: tl.constexpr):
    """Addresses of key block j's values [KEY_BLOCK, D]. v: V's plane, or its packed blocks, which are transposed."""
    key, d = tl.arange(0, KEY_BLOCK), tl.arange(0, D)
    if PV == "16bit":
        at = v + (j * KEY_BLOCK + key)[:, None] * stride_n + d[None, :] * stride_d
    else:
        at = v + j * (KEY_BLOCK * D) + key[:, None] + d[None, :] * KEY_BLOCK
    return at


@triton.jit
def _raw_scores(q, k, QK: tl.constexpr, BIASED: tl.constexpr):
    """Q K^T [rows, KEY_BLOCK] before any scale, in float32; BIASED: INT8_BIAS more."""
    if BIASED:
        start = tl.full([q.shape[0], KEY_BLOCK], INT8_BIAS_BITS, dtype=tl.int32)
        scores = tl.dot(q, k, acc=start, out_dtype=tl.int32).to(tl.float32, bitcast=True)
    elif QK == "int8":
        scores = tl.dot(q, k, out_dtype=tl.int32).to(tl.float32)
    elif QK == "fp8":
        scores = tl.dot(q, k)
    else:
        scores = tl.dot(q, k, input_precision="tf32x3")
    return scores


@triton.jit
def _attend_block(
    j, q, q_scale, acc, row_max, row_sum, k, k_scale, v, v_exponent, k_stride_n, k_stride_d, v_stride_n, v_stride_d,
    tokens, D: tl.constexpr, QK: tl.constexpr, PV: tl.constexpr, BIASED: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """One key block of the online softmax. RAGGED: the block may end before its 64 keys do."""
    valid = j * KEY_BLOCK + tl.arange(0, KEY_BLOCK) < tokens
    k_at = _key_block_at(k, j, k_stride_n, k_stride_d, D, QK)
    # packed blocks are whole, whatever K and V are
    k_tile = tl.load(k_at, mask=valid[None, :], other=0.0) if RAGGED and QK == "16bit" else tl.load(k_at)
    factor = q_scale if QK == "16bit" else q_scale * tl.load(k_scale + j)
    scores = _raw_scores(q, k_tile, QK, BIASED)  # [rows, KEY_BLOCK]

    shift = tl.load(v_exponent + j) if PV == "fp8" else 0.0
    log2_range = P_LOG2_RANGE if PV == "fp8" else 0.0
    highest = tl.max(tl.where(valid[None, :], scores, NO_SCORE) if RAGGED else scores, axis=1)
    if BIASED:
        block_max = (highest - INT8_BIAS) * factor + shift
        new_max = tl.maximum(row_max, block_max)
        p = tl.exp2((scores - highest[:, None]) * factor + (block_max - new_max + log2_range)[:, None])
    else:
        new_max = tl.maximum(row_max, highest * factor + shift)
        p = tl.exp2(scores * factor - (new_max - shift - log2_range)[:, None])
    if RAGGED:
        p = tl.where(valid[None, :], p, 0.0)
    correction = tl.exp2(row_max - new_max)
    row_sum = row_sum * correction + tl.sum(p, axis=1) * tl.exp2(-shift)
    acc = acc * correction[:, None]

    v_at = _value_block_at(v, j, v_stride_n, v_stride_d, D, PV)
    v_tile = tl.load(v_at, mask=valid[:, None], other=0.0) if RAGGED and PV == "16bit" else tl.load(v_at)
    if PV == "fp8":
        acc = tl.dot(to_fp8(p), v_tile, acc)  # [rows, D]
    else:
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision="tf32x3")
    return acc, new_max, row_sum


@triton.jit(do_not_specialize=["heads", "first_head", "q_tokens", "k_tokens", "count"])
def _sparse_attention(
    q, k, v, out, packed_k, k_scale, packed_v, v_exponent, balance, selected, ratio,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d, out_stride_b, out_stride_h, out_stride_n, out_stride_d,
    heads, first_head, q_tokens, k_tokens, count, scale_log2,
    D: tl.constexpr, TILE: tl.constexpr, QUERY_BLOCK: tl.constexpr, QK: tl.constexpr, PV: tl.constexpr, BIASED: tl.constexpr,
    SEVERAL: tl.constexpr, RATIO_KIND: tl.constexpr,
):  # fmt: skip
    tile, slot = tl.program_id(0), tl.program_id(1).to(tl.int64)
    bh = first_head + slot
    rows, d = tile_rows(tile, TILE), tl.arange(0, D)
    q_plane = plane_of(q, bh, heads, q_stride_b, q_stride_h)
    if QK == "int8":
        balance += bh * (2 * D) + D
    q_tile, q_scale = _quantize_queries(
        load_tile(q_plane, rows, d, q_stride_n, q_stride_d, q_tokens), balance, QK
    )  # [TILE, D]
    q_scale = q_scale * scale_log2
    k_blocks = tl.cdiv(k_tokens, KEY_BLOCK)
    if QK == "16bit":
        keys = plane_of(k, bh, heads, k_stride_b, k_stride_h)
    else:
        keys = packed_k + slot * k_blocks * (KEY_BLOCK * D)
        k_scale += slot * k_blocks
    if PV == "16bit":
        values = plane_of(v, bh, heads, v_stride_b, v_stride_h)
    else:
        values = packed_v + slot * k_blocks * (KEY_BLOCK * D)
        v_exponent += slot * k_blocks

    acc = tl.zeros([TILE, D], dtype=tl.float32)
    row_max = tl.full([TILE], NO_SCORE, dtype=tl.float32)
    row_sum = tl.zeros([TILE], dtype=tl.float32)
    selected += (bh * tl.cdiv(q_tokens, QUERY_BLOCK) + tile * TILE // QUERY_BLOCK) * count
    # the list ascends, so only its last block can be the ragged one: it comes first, and the loop needs no masks
    j = tl.load(selected + count - 1).to(tl.int64)
    acc, row_max, row_sum = _attend_block(
        j, q_tile, q_scale, acc, row_max, row_sum, keys, k_scale, values, v_exponent,
        k_stride_n, k_stride_d, v_stride_n, v_stride_d, k_tokens, D, QK, PV, BIASED, True,
    )  # fmt: skip
    if SEVERAL:
        # the maximum tells ptxas that the loop runs: it would otherwise wait for every single matrix instruction
        for i in range(1, tl.maximum(count, 2)):
            j = tl.load(selected + i - 1).to(tl.int64)
            acc, row_max, row_sum = _attend_block(
                j, q_tile, q_scale, acc, row_max, row_sum, keys, k_scale, values, v_exponent,
                k_stride_n, k_stride_d, v_stride_n, v_stride_d, k_tokens, D, QK, PV, BIASED, False,
            )  # fmt: skip

    inside = rows < q_tokens
    ratio_at = ratio + bh * q_tokens + rows
    out_at = tile_at(plane_of(out, bh, heads, out_stride_b, out_stride_h), rows, d, out_stride_n, out_stride_d)
    if RATIO_KIND == "none":
        row_ratio = tl.full([TILE], 1.0, dtype=tl.float32)
        acc = acc / row_sum[:, None]
    else:
        if RATIO_KIND == "estimated":
            # softmax's share of the whole mass; the mass of the unselected blocks waits where the ratio goes
            selected_mass = row_max + tl.log2(row_sum)
            if PV == "fp8":
                selected_mass -= P_LOG2_RANGE
            row_ratio = 1.0 / (1.0 + tl.exp2(tl.load(ratio_at, mask=inside, other=0.0) - selected_mass))
        else:
            row_ratio = tl.load(ratio_at, mask=inside, other=1.0)
        o_linear = tl.load(out_at, mask=inside[:, None], other=0.0).to(tl.float32)  # [TILE, D]
        acc = acc * (row_ratio / row_sum)[:, None] + o_linear * (1.0 - row_ratio)[:, None]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=inside[:, None])
    tl.store(ratio_at, row_ratio, mask=inside)


def sparse_attention(
    q, k, v, out, work, balance, selected, ratio, group, *, query_block, ratio_kind, scale_log2, qk, pv, config
):
    """Writes out (B, H, N, D) and ratio (B, H, N) for the heads of slice ``group``.

    work: the packed key blocks (Workspace). balance: of INT8 K, as in Pools. selected: int32 (B * H, T_m, n), ascending.
    ratio_kind: "learned": ``ratio`` holds it; "estimated": from the log2 of the unselected mass, which ``ratio`` holds;
    both mix with the O_l that out holds. "none": there is no linear branch to mix in.
    """
    heads, tokens, head_dim = q.shape[1:]
    count = selected.shape[2]
    launch(
        _sparse_attention, (block_count(tokens, config.tile_m), group.stop - group.start),
        q, k, v, out, work.packed_k, work.k_scale, work.packed_v, work.v_exponent, balance, selected, ratio,
        *q.stride(), *k.stride(), *v.stride(), *out.stride(),
        heads, group.start, tokens, k.shape[2], count, scale_log2,
        D=head_dim, TILE=config.tile_m, QUERY_BLOCK=query_block, QK=qk, PV=pv, BIASED=qk == "int8" and not config.converts,
        SEVERAL=count > 1, RATIO_KIND=ratio_kind, options=config.options,
    )  # fmt: skip
