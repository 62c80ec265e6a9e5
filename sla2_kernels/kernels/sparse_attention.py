"""The sparse loop: softmax attention of one query tile over its selected key blocks, then the mix with the linear branch.

One program per (query tile, head). The loop is bound by the work per score, so the scores stay raw: the softmax scale,
log2(e), the quantisation scales and FP8's range factor are folded into the one multiply-add before exp2.

INT8 scores S become float32 before they meet a factor. Hopper has an instruction for it, which costs no more than setting
each accumulator to where it starts. Other cards read that from registers that are set once: the INT32 accumulator starts at
0x4B400000, the bits of 12582912.0 whose last mantissa bit is worth 1, so its bits read as float32 are 12582912 + S exactly
while |S| < 2 ** 22. The block's maximum is taken off before the multiply-add, and the bias with it: 12582912 * factor, which
the multiply-add would take off, is rounded, at logits of 1e4 to whole powers of two of P.
V blocks are stored over powers of two: the exponent joins the scores (p V is what must fit FP8) and leaves the row sum.
"""

import triton
import triton.language as tl

from ..router import block_count
from .fp8 import to_fp8
from .int8 import INT8_BIAS, INT8_BIAS_BITS
from .launch import launch

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
    v_stride_d, tokens, D: tl.constexpr, BLOCK: tl.constexpr, QK: tl.constexpr, PV: tl.constexpr, BIASED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """One key block of the online softmax. BIASED: INT8 scores come as INT8_BIAS + S. MASKED: the block may be ragged."""
    in_block, d = tl.arange(0, BLOCK), tl.arange(0, D)
    rows = j * BLOCK + in_block
    live = rows < tokens
    if QK == "16bit":
        k_at = k_tiles + rows[None, :] * k_stride_n + d[:, None] * k_stride_d
        k = tl.load(k_at, mask=live[None, :], other=0.0) if MASKED else tl.load(k_at)
        scores = tl.dot(q, k, input_precision="tf32x3")
        factor = q_scale
    else:
        k = tl.load(k_tiles + j * (BLOCK * D) + in_block[None, :] * D + d[:, None])
        factor = q_scale * tl.load(k_scales + j)
        if BIASED:
            start = tl.full([q.shape[0], BLOCK], INT8_BIAS_BITS, dtype=tl.int32)
            scores = tl.dot(q, k, acc=start, out_dtype=tl.int32).to(tl.float32, bitcast=True)
        elif QK == "int8":
            scores = tl.dot(q, k, out_dtype=tl.int32).to(tl.float32)
        else:
            scores = tl.dot(q, k)

    if PV == "fp8":
        shift = tl.load(v_exponents + j)
        log2_range = P_LOG2_RANGE
    else:
        shift = 0.0
        log2_range = 0.0
    highest = tl.max(tl.where(live[None, :], scores, LOWEST) if MASKED else scores, axis=1)
    if BIASED:
        block_max = (highest - INT8_BIAS) * factor + shift
        new_max = tl.maximum(row_max, block_max)
        p = tl.exp2((scores - highest[:, None]) * factor + (block_max - new_max + log2_range)[:, None])
    else:
        new_max = tl.maximum(row_max, highest * factor + shift)
        p = tl.exp2(scores * factor - (new_max - shift - log2_range)[:, None])
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


@triton.jit(do_not_specialize=["heads", "first_head", "q_tokens", "k_tokens", "q_blocks", "k_blocks", "count"])
def _sparse_attention(
    q, k, v, out, k_low, k_scale, v_low, v_exponent, selected, row_ratio,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d, out_stride_b, out_stride_h, out_stride_n, out_stride_d,
    heads, first_head, q_tokens, k_tokens, q_blocks, k_blocks, count, scale_log2,
    D: tl.constexpr, TILE: tl.constexpr, Q_BLOCK: tl.constexpr, BLOCK: tl.constexpr, QK: tl.constexpr, PV: tl.constexpr,
    BIASED: tl.constexpr, SEVERAL: tl.constexpr, RATIO: tl.constexpr,
):  # fmt: skip
    tile, slot = tl.program_id(0), tl.program_id(1).to(tl.int64)
    bh = first_head + slot
    q_block = tile * TILE // Q_BLOCK
    rows, d = (tile * TILE + tl.arange(0, TILE)).to(tl.int64), tl.arange(0, D)
    q_at = q + bh // heads * q_stride_b + bh % heads * q_stride_h + rows[:, None] * q_stride_n + d * q_stride_d
    q_tile, q_scale = _quantize_queries(tl.load(q_at, mask=rows[:, None] < q_tokens, other=0.0), QK)
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
    # the list ascends, so only its last block can be the ragged one
    j = tl.load(selected + count - 1).to(tl.int64)
    acc, row_max, row_sum = _attend_block(
        j, q_tile, q_scale, acc, row_max, row_sum, k_tiles, k_scale, v_tiles, v_exponent,
        k_stride_n, k_stride_d, v_stride_n, v_stride_d, k_tokens, D, BLOCK, QK, PV, BIASED, True,
    )  # fmt: skip
    if SEVERAL:
        # a loop that may run zero times would make ptxas wait for every single matrix instruction
        for i in range(1, tl.maximum(count, 2)):
            j = tl.load(selected + i - 1).to(tl.int64)
            acc, row_max, row_sum = _attend_block(
                j, q_tile, q_scale, acc, row_max, row_sum, k_tiles, k_scale, v_tiles, v_exponent,
                k_stride_n, k_stride_d, v_stride_n, v_stride_d, k_tokens, D, BLOCK, QK, PV, BIASED, False,
            )  # fmt: skip

    inside = rows < q_tokens
    ratio_at = row_ratio + bh * q_tokens + rows
    out_at = (
        out + bh // heads * out_stride_b + bh % heads * out_stride_h + rows[:, None] * out_stride_n + d * out_stride_d
    )
    if RATIO == "none":
        ratio = tl.full([TILE], 1.0, dtype=tl.float32)
        acc = acc / row_sum[:, None]
    else:
        if RATIO == "estimated":
            selected_mass = row_max + tl.log2(row_sum)
            if PV == "fp8":
                selected_mass -= P_LOG2_RANGE
            ratio = 1.0 / (1.0 + tl.exp2(tl.load(ratio_at, mask=inside, other=0.0) - selected_mass))
        else:
            ratio = tl.load(ratio_at, mask=inside, other=1.0)
        o_linear = tl.load(out_at, mask=inside[:, None], other=0.0).to(tl.float32)
        acc = acc * (ratio / row_sum)[:, None] + o_linear * (1.0 - ratio)[:, None]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=inside[:, None])
    tl.store(ratio_at, ratio, mask=inside)


def sparse_attention(
    q,
    k,
    v,
    out,
    work,
    selected,
    row_ratio,
    heads_slice,
    *,
    ratio,
    scale_log2,
    qk,
    pv,
    q_block,
    block,
    config,
    plan=None,
):
    """Writes out (B, H, N, D) and row_ratio (B, H, N) for the heads of ``heads_slice``.

    work: the packed key blocks (Workspace). selected: int32 (B * H, T_m, n), ascending.
    ratio: "learned", that of row_ratio; "estimated", from the unselected log2 mass that row_ratio holds; either mixes
    with the O_l that out holds. "none": there is no linear branch to mix in.
    """
    heads, tokens, head_dim = q.shape[1:]
    q_blocks, count = selected.shape[1:]
    grid = (block_count(tokens, config.tile_m), heads_slice.stop - heads_slice.start)
    launch(
        plan, _sparse_attention, grid, q, k, v, out, work.k_low, work.k_scale, work.v_low, work.v_exponent, selected,
        row_ratio,
        *q.stride(), *k.stride(), *v.stride(), *out.stride(),
        heads, heads_slice.start, tokens, k.shape[2], q_blocks, block_count(k.shape[2], block), count, scale_log2,
        D=head_dim, TILE=config.tile_m, Q_BLOCK=q_block, BLOCK=block, QK=qk, PV=pv,
        BIASED=qk == "int8" and not config.converts, SEVERAL=count > 1, RATIO=ratio,
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )  # fmt: skip
