"""One pass over K and V: what the sparse loop and the linear branch need of each key block.

One program per (key block, head). Low bit: K smoothed, INT8 or FP8 with one scale per block; V in FP8 over a power of
two per block, stored transposed because FP8 matrix units want it along the keys. Linear branch: h_j = phi(K_j)^T V_j,
and z_j, the column sums of phi(K_j), both divided by the block's 64 tokens so that float16 holds them; h_j in FP8 over a
power of two per block where hopper_masked_sum.py adds it up: that of a bound, z_j max |V_j|, so that h_j need not be complete
before its first part leaves.
"""

import triton
import triton.language as tl

from ..router import block_count
from .base2 import LOG2_E
from .fp8 import to_fp8
from .int8 import INT8_BIAS
from .launch import launch

FP8_MAX = tl.constexpr(448.0)
SMALLEST_EXPONENT = tl.constexpr(-60.0)  # an all-zero V block: far below real ones, and 2 ** 60 still fits float32


@triton.jit
def _exponent(largest):
    """That of the least power of two that brings values up to ``largest`` within FP8."""
    return tl.maximum(tl.ceil(tl.log2(tl.maximum(largest, 1e-30) / FP8_MAX)), SMALLEST_EXPONENT)


@triton.jit(do_not_specialize=["heads", "first_head", "tokens"])
def _pack(
    k, v, k_mean, k_low, k_scale, v_low, v_exponent, sums, sums_exponent, norms,
    k_stride_b, k_stride_h, k_stride_n, k_stride_d, v_stride_b, v_stride_h, v_stride_n, v_stride_d,
    heads, first_head, tokens,
    D: tl.constexpr, BLOCK: tl.constexpr, QK: tl.constexpr, PV: tl.constexpr, LINEAR: tl.constexpr, LOW_SUMS: tl.constexpr,
    SUM_STRIDE: tl.constexpr, NORM_STRIDE: tl.constexpr, REGISTER_ORDER: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    block, slot = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    bh = first_head + slot
    tile_index = slot * tl.num_programs(0) + block
    place, d = tl.arange(0, BLOCK), tl.arange(0, D)
    PART: tl.constexpr = D // PARTS
    part = tl.arange(0, PART)
    in_block, channel = place, part
    if REGISTER_ORDER:
        # in each 16 keys and 32 channels: bits abbc of a key and aabbc of a channel become bbac and bbaac
        in_block = (place & ~15) | (place & 1) | (place >> 1 & 1) << 3 | (place >> 2 & 3) << 1
        channel = (part & ~31) | (part & 1) | (part >> 1 & 3) << 3 | (part >> 3 & 3) << 1
    rows = block * BLOCK + in_block
    live = rows[:, None] < tokens

    k_base = k + bh // heads * k_stride_b + bh % heads * k_stride_h
    v_at = v + bh // heads * v_stride_b + bh % heads * v_stride_h + rows[:, None] * v_stride_n + part * v_stride_d
    mean = tl.load(k_mean + bh * D + d)
    k_raw = tl.load(k_base + rows[:, None] * k_stride_n + d * k_stride_d, mask=live, other=0.0)
    v_first = tl.load(v_at, mask=live, other=0.0)
    v_last = v_first
    if PARTS == 2:
        v_last = tl.load(v_at + PART * v_stride_d, mask=live, other=0.0)
    k_smooth = tl.where(live, k_raw.to(tl.float32) - mean, 0.0)

    if QK != "16bit":
        largest = tl.maximum(tl.max(tl.abs(k_smooth)), 1e-20)
        k_out = k_low + tile_index * (BLOCK * D) + in_block[:, None] * D + d
        if QK == "int8":
            # the float32 with a last bit worth 1 rounds, and its last byte is the INT8
            biased = k_smooth * (127.0 / largest) + INT8_BIAS
            tl.store(k_out, biased.to(tl.int32, bitcast=True).to(tl.int8))
            tl.store(k_scale + tile_index, largest / 127.0)
        else:
            tl.store(k_out, to_fp8(k_smooth * (FP8_MAX / largest)))
            tl.store(k_scale + tile_index, largest / FP8_MAX)

    v_largest = tl.maximum(tl.max(tl.abs(v_first.to(tl.float32))), tl.max(tl.abs(v_last.to(tl.float32))))
    if PV == "fp8":
        exponent = _exponent(v_largest)
        tl.store(v_exponent + tile_index, exponent)

    if LINEAR:
        exponentials = tl.exp2(k_smooth * LOG2_E - (tl.max(k_smooth, axis=1) * LOG2_E)[:, None])
        share = tl.where(rows < tokens, 1.0 / (BLOCK * tl.sum(exponentials, axis=1)), 0.0)
        z = tl.sum(exponentials * share[:, None], axis=0)
        tl.store(norms + tile_index * NORM_STRIDE + d, z.to(norms.dtype.element_ty))
        if LOW_SUMS:
            # |h_j| <= z_j max |V_j|, and a little more for phi's rounding
            h_exponent = _exponent(1.01 * tl.max(z, axis=0) * v_largest)
            tl.store(sums_exponent + tile_index, h_exponent)
            share *= tl.exp2(-h_exponent)
        phi = (exponentials * share[:, None]).to(norms.dtype.element_ty)

    for p in tl.static_range(PARTS):
        v_raw = v_first if p == 0 else v_last
        if PV == "fp8":
            v_scaled = to_fp8(v_raw.to(tl.float32) * tl.exp2(-exponent))
            v_out = v_low + tile_index * (BLOCK * D) + (p * PART + channel)[:, None] * BLOCK + place
            tl.store(v_out, tl.trans(v_scaled))
        if LINEAR:
            h = tl.dot(tl.trans(phi), v_raw.to(phi.dtype), input_precision="tf32x3")
            if REGISTER_ORDER:
                h = h.reshape([D, PART // 32, 4, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([D, PART])
            h_out = sums + tile_index * SUM_STRIDE + d[:, None] * D + p * PART + part
            tl.store(h_out, to_fp8(h) if LOW_SUMS else h.to(phi.dtype))


def pack(k, v, k_mean, work, heads_slice, block, qk, pv, plan=None, *, register_order=False):
    """Fills ``work`` (a Workspace) for the heads of ``heads_slice`` of k and v (B, H, M, D), any stride.

    register_order: FP8 V as hopper_loop.py's registers want it, instead of key after key and channel after channel; h_j's
    columns, which are V's channels, likewise.
    """
    heads, tokens, head_dim = k.shape[1:]
    linear, low_sums = work.sums is not None, work.sums_exponent is not None
    if qk == "16bit" and not linear:
        return
    grid = (block_count(tokens, block), heads_slice.stop - heads_slice.start)
    launch(
        plan, _pack, grid, k, v, k_mean, work.k_low, work.k_scale, work.v_low, work.v_exponent,
        work.sums, work.sums_exponent, work.norms, *k.stride(), *v.stride(), heads, heads_slice.start, tokens,
        D=head_dim, BLOCK=block, QK=qk, PV=pv, LINEAR=linear, LOW_SUMS=low_sums,
        SUM_STRIDE=work.sums.stride(1) if linear else 0, NORM_STRIDE=work.norms.stride(1) if linear else 0,
        REGISTER_ORDER=register_order, PARTS=2 if register_order else 1,
        # 4 warps that take h_j in two parts need 168 registers a thread, and three such programs run at a time
        options={"num_warps": 4 if register_order else 8},
    )  # fmt: skip
