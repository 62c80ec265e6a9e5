"""One pass over K and V: what the sparse loop and the linear branch need of each key block.

One program per (key block, head). 8 bit: K smoothed, INT8 or FP8 with one scale per block; V in FP8 over a power of two
per block, stored transposed because 8-bit matrix instructions want it along the keys (V in INT8: int8_pack.py). Linear
branch: h_j = phi(K_j)^T V_j and z_j, the column sums of phi(K_j), both divided by the block's 64 tokens so that float16 holds
them. Beside FP8 V h_j is in FP8 over a power of two per block, that of the bound z_j max |V_j|, which is known before h_j is, so
that h_j can leave in parts.
"""

import torch
import triton
import triton.language as tl

from ..router import K_BLOCK, block_count
from . import configs
from .launch import launch
from .numerics import FP8_MAX, INT8_BIAS, INT8_MAX, LOG2_E, MIN_MAGNITUDE, fp8_exponent, to_fp8
from .planes import KEY_BLOCK, ask_for_rows, plane_of, tile_at

MAX_PROGRAMS = 65535  # along the second axis of a launch
HOPPER_GROUP = 32  # channels that change places with each other


@triton.jit
def register_order_of_keys(key):
    """Where a key goes so that P's registers are an 8-bit operand: in each 16, bits abbc of its number become bbac."""
    return (key & ~15) | (key & 1) | (key >> 1 & 1) << 3 | (key >> 2 & 3) << 1


@triton.jit
def register_order_of_channels(channel):
    """Where a channel goes so that a thread's outputs are neighbours: in each 32, bits aabbc become bbaac."""
    return (channel & ~31) | (channel & 1) | (channel >> 1 & 3) << 3 | (channel >> 3 & 3) << 1


@triton.jit
def from_register_order_of_channels(x, D: tl.constexpr, GROUP: tl.constexpr):
    """A vector [D] in that order, channel after channel. GROUP: how many change places; in other groups there are more a's."""
    return x.reshape([D // GROUP, 4, GROUP // 8, 2]).permute([0, 2, 1, 3]).reshape([D])


@triton.jit(do_not_specialize=["heads", "first_head", "tokens", "ahead"])
def _pack(
    k, v, k_mean, balance, packed_k, k_scale, packed_v, v_exponent, sums, sums_exponent, norms,
    k_stride_b, k_stride_h, k_stride_n, k_stride_d, v_stride_b, v_stride_h, v_stride_n, v_stride_d,
    heads, first_head, tokens, ahead,
    D: tl.constexpr, QK: tl.constexpr, PV: tl.constexpr, LINEAR: tl.constexpr, SUMS: tl.constexpr,
    SUM_STRIDE: tl.constexpr, NORM_STRIDE: tl.constexpr, REGISTER_ORDER: tl.constexpr, PARTS: tl.constexpr,
    HEADS_FIRST: tl.constexpr,
):  # fmt: skip
    # all heads of a block one after the other: in (B, N, H, D) their rows are neighbours in memory
    SLOT: tl.constexpr = 0 if HEADS_FIRST else 1
    blocks = tl.num_programs(1 - SLOT)
    block, slot = tl.program_id(1 - SLOT).to(tl.int64), tl.program_id(SLOT).to(tl.int64)
    bh = first_head + slot
    tile = slot * blocks + block  # of the workspace, which holds this group's heads only
    place, d = tl.arange(0, KEY_BLOCK), tl.arange(0, D)
    PART: tl.constexpr = D // PARTS
    part = tl.arange(0, PART)
    key, channel = place, part  # what stands at each place
    if REGISTER_ORDER:
        key, channel = register_order_of_keys(place), register_order_of_channels(part)
    rows = block * KEY_BLOCK + key
    valid = rows[:, None] < tokens

    k_plane = plane_of(k, bh, heads, k_stride_b, k_stride_h)
    v_plane = plane_of(v, bh, heads, v_stride_b, v_stride_h)
    v_at = tile_at(v_plane, rows, part, v_stride_n, v_stride_d)
    mean = tl.load(k_mean + bh * D + d)  # [D]
    k_raw = tl.load(tile_at(k_plane, rows, d, k_stride_n, k_stride_d), mask=valid, other=0.0)  # [KEY_BLOCK, D]
    v_first = tl.load(v_at, mask=valid, other=0.0)  # [KEY_BLOCK, PART]
    v_last = v_first
    if PARTS == 2:
        v_last = tl.load(v_at + PART * v_stride_d, mask=valid, other=0.0)  # [KEY_BLOCK, PART]

    # of a program to come, which would wait for memory
    later = tl.minimum(block * KEY_BLOCK + place + ahead, tokens - 1).to(tl.int64)
    ask_for_rows(k_plane, later, k_stride_n, k_stride_d, D)
    ask_for_rows(v_plane, later, v_stride_n, v_stride_d, D)

    # V first, while K takes half the registers
    v_largest = tl.max(tl.maximum(tl.abs(v_first), tl.abs(v_last)).to(tl.float32))
    if PV == "fp8":
        exponent = fp8_exponent(v_largest)
        tl.store(v_exponent + tile, exponent)

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
        share = 1.0 / (KEY_BLOCK * tl.sum(exponentials, axis=1))  # [KEY_BLOCK]
        phi = (exponentials * share[:, None]).to(norms.dtype.element_ty)  # [KEY_BLOCK, D]
        # of the keys that there are: V is zero for the others
        if phi.dtype == tl.float32:
            z = tl.sum(tl.where(valid, phi, 0.0), axis=0)  # [D]
        else:
            # a product, each column of it; of float32 Triton 3.2 ends the process for Hopper
            z = tl.max(tl.dot(tl.trans(phi), tl.broadcast_to(valid, [KEY_BLOCK, 16]).to(phi.dtype)), axis=1)  # [D]
        tl.store(norms + tile * NORM_STRIDE + d, z.to(norms.dtype.element_ty))
        if SUMS == "fp8":
            # |h_j| <= z_j max |V_j|, and a little more for rounding
            h_exponent = fp8_exponent(1.01 * tl.max(z, axis=0) * v_largest)
            tl.store(sums_exponent + tile, h_exponent)
            to_range = tl.exp2(-h_exponent)

    for p in tl.static_range(PARTS):
        v_raw = v_first if p == 0 else v_last
        if PV == "fp8":
            v_scaled = to_fp8(v_raw.to(tl.float32) * tl.exp2(-exponent))
            v_out = packed_v + tile * (KEY_BLOCK * D) + (p * PART + channel)[:, None] * KEY_BLOCK + place
            tl.store(v_out, tl.trans(v_scaled))  # [PART, KEY_BLOCK]
        if LINEAR:
            h = tl.dot(tl.trans(phi), v_raw.to(phi.dtype), input_precision="tf32x3")  # [D, PART]
            if REGISTER_ORDER:
                # the columns change places in registers, so that the stores stay wide
                h = h.reshape([D, PART // 32, 4, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([D, PART])
            h_out = sums + tile * SUM_STRIDE + d[:, None] * D + p * PART + part
            tl.store(h_out, to_fp8(h * to_range) if SUMS == "fp8" else h.to(phi.dtype))


def order_of_programs(tokens, group, config):
    """(grid, whether the heads of slice ``group`` come first along it, how many tokens further on L2 is asked for K and V)."""
    blocks, slots = block_count(tokens, K_BLOCK), group.stop - group.start
    heads_first = blocks <= MAX_PROGRAMS
    ahead = block_count(config.ahead, slots) if heads_first else config.ahead
    return (slots, blocks) if heads_first else (blocks, slots), heads_first, ahead * K_BLOCK


def pack(k, v, k_mean, work, group, qk, pv, *, balance=None, register_order=False):
    """Fills ``work`` (a Workspace) for the heads of slice ``group`` of k and v (B, H, M, D), any stride.

    register_order: FP8 V as the registers of hopper_loop.py want it, instead of key after key and channel after channel;
    likewise h_j's columns, which are V's channels. balance: of INT8 K, as in Pools.
    """
    heads, tokens, head_dim = k.shape[1:]
    linear = work.sums is not None
    if qk == "16bit" and not linear:
        return
    config = configs.pack_config(register_order)
    grid, heads_first, ahead = order_of_programs(tokens, group, config)
    launch(
        _pack, grid,
        k, v, k_mean, balance, work.packed_k, work.k_scale, work.packed_v, work.v_exponent, work.sums, work.sums_exponent, work.norms,
        *k.stride(), *v.stride(), heads, group.start, tokens, ahead,
        D=head_dim, QK=qk, PV=pv, LINEAR=linear, SUMS="fp8" if linear and work.sums.dtype == torch.float8_e4m3fn else "16bit",
        SUM_STRIDE=work.sums.stride(1) if linear else 0, NORM_STRIDE=work.norms.stride(1) if linear else 0,
        REGISTER_ORDER=register_order, PARTS=config.parts, HEADS_FIRST=heads_first, options=config.options,
    )  # fmt: skip
