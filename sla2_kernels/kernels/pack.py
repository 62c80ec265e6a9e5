"""One pass over K and V: what the sparse loop and the linear branch need of each key block.

One program per (key block, head). 8 bit: K smoothed, INT8 or FP8 with one scale per block; V in FP8 over a power of two
per block, or in INT8 over one per channel and one scale per block, stored transposed because 8-bit matrix instructions
want it along the keys. Linear branch: h_j = phi(K_j)^T V_j
and z_j, the column sums of phi(K_j), both divided by the block's 64 tokens so that float16 holds them. Beside 8-bit V
h_j is in 8 bit over a power of two per block: in FP8 that of the bound z_j max |V_j|, which is known before h_j is, so that h_j can
leave in parts; in INT8, which has no octave to spare, that of its largest element, its columns over V's channel powers.
"""

import torch
import triton
import triton.language as tl

from ..router import K_BLOCK, block_count
from . import configs
from .launch import launch
from .numerics import (
    FLOAT32_ONE,
    FP8_MAX,
    INT8_BIAS,
    INT8_MAX,
    LOG2_E,
    MIN_EXPONENT,
    MIN_MAGNITUDE,
    fp8_exponent,
    to_fp8,
)
from .planes import KEY_BLOCK, plane_of, tile_at

SUMS_FORMATS = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}  # of h_j; others are "16bit"


@triton.jit
def register_order_of_keys(key):
    """Where a key goes so that P's registers are an 8-bit operand: in each 16, bits abbc of its number become bbac."""
    return (key & ~15) | (key & 1) | (key >> 1 & 1) << 3 | (key >> 2 & 3) << 1


@triton.jit
def register_order_of_channels(channel):
    """Where a channel goes so that a thread's outputs are neighbours: in each 32, bits aabbc become bbaac."""
    return (channel & ~31) | (channel & 1) | (channel >> 1 & 3) << 3 | (channel >> 3 & 3) << 1


@triton.jit
def from_register_order_of_channels(x, D: tl.constexpr):
    """A vector [D] in that order, channel after channel."""
    return x.reshape([D // 32, 4, 4, 2]).permute([0, 2, 1, 3]).reshape([D])


@triton.jit
def int8_exponent(largest):
    """log2 of a scale that brings magnitudes up to ``largest`` within INT8, and a little more for its own rounding."""
    return tl.maximum(tl.log2(tl.maximum(largest, 1e-30) * (1.001 / INT8_MAX)), MIN_EXPONENT)


@triton.jit
def _over_power(power):
    """1 / power, exactly; power: float32, a power of two. Its exponent changes sign: a division takes eight instructions."""
    return (-power.to(tl.int32, bitcast=True) + 2 * FLOAT32_ONE).to(tl.float32, bitcast=True)


@triton.jit
def _int8_power(largest):
    """Exponent of the smallest power of two that brings magnitudes up to ``largest`` within INT8."""
    return tl.maximum(tl.ceil(tl.log2(tl.maximum(largest, 1e-30) * (1.00001 / INT8_MAX))), MIN_EXPONENT)


@triton.jit
def _even_sums(phi, v, v_channel):
    """h_j of a part of V's channels, over their powers of two, [D, PART] in phi's dtype. v_channel: where those powers begin."""
    h = tl.dot(tl.trans(phi), v.to(phi.dtype), input_precision="tf32x3") * _over_power(tl.load(v_channel))[None, :]
    return h.to(phi.dtype)


@triton.jit
def _larger(x, y):
    """Elementwise the larger magnitude, float32."""
    return tl.maximum(tl.abs(x.to(tl.float32)), tl.abs(y.to(tl.float32)))


@triton.jit(do_not_specialize=["heads", "first_head", "tokens"])
def _pack(
    k, v, k_mean, balance, v_channel, packed_k, k_scale, packed_v, v_exponent, sums, sums_exponent, norms,
    k_stride_b, k_stride_h, k_stride_n, k_stride_d, v_stride_b, v_stride_h, v_stride_n, v_stride_d,
    heads, first_head, tokens,
    D: tl.constexpr, QK: tl.constexpr, PV: tl.constexpr, LINEAR: tl.constexpr, SUMS: tl.constexpr,
    SUM_STRIDE: tl.constexpr, NORM_STRIDE: tl.constexpr, REGISTER_ORDER: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    block, slot = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    bh = first_head + slot
    tile = slot * tl.num_programs(0) + block  # of the workspace, which holds this group's heads only
    place, d = tl.arange(0, KEY_BLOCK), tl.arange(0, D)
    PART: tl.constexpr = D // PARTS
    part = tl.arange(0, PART)
    key, channel = place, part  # what stands at each place
    if REGISTER_ORDER:
        key, channel = register_order_of_keys(place), register_order_of_channels(part)
    elif PV == "int8":
        key = register_order_of_keys(place)
    rows = block * KEY_BLOCK + key
    valid = rows[:, None] < tokens

    k_plane = plane_of(k, bh, heads, k_stride_b, k_stride_h)
    v_at = tile_at(plane_of(v, bh, heads, v_stride_b, v_stride_h), rows, part, v_stride_n, v_stride_d)
    mean = tl.load(k_mean + bh * D + d)  # [D]
    k_raw = tl.load(tile_at(k_plane, rows, d, k_stride_n, k_stride_d), mask=valid, other=0.0)  # [KEY_BLOCK, D]
    v_first = tl.load(v_at, mask=valid, other=0.0)  # [KEY_BLOCK, PART]
    v_last = v_first
    if PARTS == 2:
        v_last = tl.load(v_at + PART * v_stride_d, mask=valid, other=0.0)  # [KEY_BLOCK, PART]

    # V first, while K takes half the registers
    even_first, even_last = v_first.to(tl.float32), v_last.to(tl.float32)
    if PV == "int8":
        even_first *= _over_power(tl.load(v_channel + bh * D + part))[None, :]
        even_last *= _over_power(tl.load(v_channel + bh * D + (D - PART) + part))[None, :]
        # as an integer NaN is the largest
        largest_or_nan = tl.maximum(tl.abs(even_first), tl.abs(even_last), propagate_nan=tl.PropagateNan.ALL)
        v_largest = tl.max(largest_or_nan.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    else:
        v_largest = tl.max(_larger(even_first, even_last))
    if PV == "fp8":
        exponent = fp8_exponent(v_largest)
        tl.store(v_exponent + tile, exponent)
    elif PV == "int8":
        # INT8 has no NaN: one in V, or an infinity, goes on as that of the exponent and of z_j
        zero_or_nan = 0.0 * v_largest
        exponent = int8_exponent(v_largest) + zero_or_nan
        tl.store(v_exponent + tile, exponent)
        for p in tl.static_range(PARTS):
            biased = (even_first if p == 0 else even_last) * tl.exp2(-exponent) + INT8_BIAS
            v_out = packed_v + tile * (KEY_BLOCK * D) + (p * PART + part)[:, None] * KEY_BLOCK + place
            tl.store(v_out, tl.trans(biased.to(tl.int32, bitcast=True).to(tl.int8)))  # [PART, KEY_BLOCK]

    k_smooth = tl.where(valid, k_raw.to(tl.float32) - mean, 0.0)  # [KEY_BLOCK, D]
    if QK == "int8":
        factor = tl.load(balance + bh * (2 * D) + d)[None, :]
        largest = tl.maximum(tl.max(tl.abs(k_smooth * factor)), MIN_MAGNITUDE)
        # the bias rounds, and the last byte of the sum is the INT8
        biased = k_smooth * (factor * (INT8_MAX / largest)) + INT8_BIAS
        tl.store(
            packed_k + tile * (KEY_BLOCK * D) + key[:, None] * D + d, biased.to(tl.int32, bitcast=True).to(tl.int8)
        )
        tl.store(k_scale + tile, largest / INT8_MAX)
    elif QK == "fp8":
        largest = tl.maximum(tl.max(tl.abs(k_smooth)), MIN_MAGNITUDE)
        tl.store(packed_k + tile * (KEY_BLOCK * D) + key[:, None] * D + d, to_fp8(k_smooth * (FP8_MAX / largest)))
        tl.store(k_scale + tile, largest / FP8_MAX)

    if LINEAR:
        exponentials = tl.exp2(k_smooth * LOG2_E - (tl.max(k_smooth, axis=1) * LOG2_E)[:, None])  # [KEY_BLOCK, D]
        share = tl.where(rows < tokens, 1.0 / (KEY_BLOCK * tl.sum(exponentials, axis=1)), 0.0)  # [KEY_BLOCK]
        z = tl.sum(exponentials * share[:, None], axis=0)  # [D]
        if SUMS == "int8":
            z += zero_or_nan
        tl.store(norms + tile * NORM_STRIDE + d, z.to(norms.dtype.element_ty))
        if SUMS == "fp8":
            # |h_j| <= z_j max |V_j|, and a little more for phi's rounding
            h_exponent = fp8_exponent(1.01 * tl.max(z, axis=0) * v_largest)
            tl.store(sums_exponent + tile, h_exponent)
            share *= tl.exp2(-h_exponent)
        phi = (exponentials * share[:, None]).to(norms.dtype.element_ty)  # [KEY_BLOCK, D]
        if SUMS == "int8":
            # held in 16 bit until its largest element is known
            h_first = _even_sums(phi, v_first, v_channel + bh * D + part)
            h_last = h_first
            if PARTS == 2:
                h_last = _even_sums(phi, v_last, v_channel + bh * D + PART + part)
            h_power = _int8_power(tl.max(_larger(h_first, h_last)))
            tl.store(sums_exponent + tile, h_power)

    for p in tl.static_range(PARTS):
        v_raw = v_first if p == 0 else v_last
        if PV == "fp8":
            v_scaled = to_fp8(v_raw.to(tl.float32) * tl.exp2(-exponent))
            v_out = packed_v + tile * (KEY_BLOCK * D) + (p * PART + channel)[:, None] * KEY_BLOCK + place
            tl.store(v_out, tl.trans(v_scaled))  # [PART, KEY_BLOCK]
        if LINEAR:
            if SUMS == "int8":
                h = (h_first if p == 0 else h_last).to(tl.float32) * tl.exp2(-h_power) + INT8_BIAS  # [D, PART]
            else:
                h = tl.dot(tl.trans(phi), v_raw.to(phi.dtype), input_precision="tf32x3")
            if REGISTER_ORDER:
                # the columns change places in registers, so that the stores stay wide
                h = h.reshape([D, PART // 32, 4, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([D, PART])
            h_out = sums + tile * SUM_STRIDE + d[:, None] * D + p * PART + part
            if SUMS == "int8":
                tl.store(h_out, h.to(tl.int32, bitcast=True).to(tl.int8))
            else:
                tl.store(h_out, to_fp8(h) if SUMS == "fp8" else h.to(phi.dtype))


def pack(k, v, k_mean, work, group, qk, pv, *, balance=None, v_channel=None, register_order=False):
    """Fills ``work`` (a Workspace) for the heads of slice ``group`` of k and v (B, H, M, D), any stride.

    register_order: FP8 V as the registers of hopper_loop.py want it, instead of key after key and channel after channel;
    likewise h_j's columns, which are V's channels. balance, v_channel: of INT8 K and of INT8 V, as in Pools.
    """
    heads, tokens, head_dim = k.shape[1:]
    linear = work.sums is not None
    if qk == "16bit" and not linear:
        return
    config = configs.pack_config(pv, register_order, v.element_size())
    launch(
        _pack, (block_count(tokens, K_BLOCK), group.stop - group.start),
        k, v, k_mean, balance, v_channel, work.packed_k, work.k_scale, work.packed_v, work.v_exponent, work.sums, work.sums_exponent, work.norms,
        *k.stride(), *v.stride(), heads, group.start, tokens,
        D=head_dim, QK=qk, PV=pv, LINEAR=linear, SUMS=SUMS_FORMATS.get(work.sums.dtype, "16bit") if linear else "16bit",
        SUM_STRIDE=work.sums.stride(1) if linear else 0, NORM_STRIDE=work.norms.stride(1) if linear else 0,
        REGISTER_ORDER=register_order, PARTS=config.parts, options=config.options,
    )  # fmt: skip
