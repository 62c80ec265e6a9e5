"""One pass over K and V for cards with mma.sync, as pack.py, with K, V and h_j in INT8.

One program per (key block, head). Keys past the end are copies of the last one: no product counts them.

h_j = phi(K_j)^T V_j is of V over its channel powers and over a power of two more, which follows from V's largest element: |h_j|
is at most that, so float16 holds it until its own largest element is known. Its columns, V's channels, stay in the order in which
a thread has them, 16 in a store, and V's are stored in it too (product_order.py).
"""

import triton
import triton.language as tl

from ..support import interpreting
from . import configs
from .launch import launch
from .numerics import FLOAT32_ONE, INT8_BIAS, INT8_MAX, LOG2_E, MIN_EXPONENT, MIN_MAGNITUDE, largest_or_nan
from .pack import order_of_programs, register_order_of_keys
from .pairs import bytes_of_halves, half_biased, widened
from .planes import EVICT_FIRST, KEY_BLOCK, ask_for_rows, tile_at
from .product_order import GROUP, halves, place_of, row_at

MIN_LARGEST = tl.constexpr(2.0**-40)  # of V over its channel powers, which are 2^-67 or more: no factor is infinite
# what the terms of h_j and z_j are rounded to, whatever K and V are: h_j leaves in INT8
TERMS = tl.constexpr(tl.float32 if interpreting() else tl.bfloat16)
BOUND_LOG2 = tl.constexpr(15)  # |h_j| is below its power of two in float16
MIN_H_EXPONENT = tl.constexpr(-15.0)  # float16 has no factor above 2^15


@triton.jit
def _stored_order(h, WARPS: tl.constexpr):
    """h [D, GROUP] with its columns in that order, and its rows in that of row_at()."""
    D: tl.constexpr = h.shape[0]
    SIZE: tl.constexpr = h.shape[1]
    h = h.reshape([D // (16 * WARPS), WARPS, 2, 8, SIZE // 8, 4, 2])
    return h.permute([0, 2, 1, 3, 5, 4, 6]).reshape([D, SIZE])


@triton.jit
def _groups(h, GROUP: tl.constexpr):
    """The first and the last GROUP columns of h; h twice where it has no more."""
    if h.shape[1] > GROUP:
        first, last = halves(h)
    else:
        first, last = h, h
    return first, last


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _over_power(power, log2):
    """2^log2 / power, exactly; power: float32, a power of two."""
    return (-_bits(power) + (2 * FLOAT32_ONE + (log2 << 23))).to(tl.float32, bitcast=True)


@triton.jit
def _power_of_two(log2):
    return ((log2 + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _largest(magnitudes):
    """The largest of float32 magnitudes, or NaN: as integers, for which a warp has an instruction, NaN is the largest."""
    return tl.max(_bits(magnitudes)).to(tl.float32, bitcast=True)


@triton.jit
def _largest_of_rows(x, APART: tl.constexpr):
    """Largest magnitudes over rows that lie APART, which one thread has, or NaN; float32 [APART, columns]."""
    ROWS: tl.constexpr = x.shape[0] // APART
    return largest_or_nan(tl.abs(x.to(tl.float32)).reshape([ROWS, APART, x.shape[1]]), 0)


@triton.jit
def _largest_half(x):
    """The largest magnitude of float16 x [D, D], float32: first over columns of one thread, two numbers at a time."""
    D: tl.constexpr = x.shape[0]
    larger = largest_or_nan(tl.abs(x).reshape([D, D // 8, 8]), 1)
    return _largest(larger.to(tl.float32))


@triton.jit(do_not_specialize=["heads", "first_head", "tokens", "ahead"])
def _int8_pack(
    k, v, k_mean, balance, v_channel, packed_k, k_scale, packed_v, v_exponent, sums, sums_exponent, norms,
    k_stride_b, k_stride_h, k_stride_n, k_stride_d, v_stride_b, v_stride_h, v_stride_n, v_stride_d,
    heads, first_head, tokens, ahead,
    D: tl.constexpr, LINEAR: tl.constexpr, GROUP: tl.constexpr, WARPS: tl.constexpr, HEADS_FIRST: tl.constexpr,
):  # fmt: skip
    # Triton gives a thread 16 numbers of a row, as many as its widest store has, and loads them in two instructions of which each
    # takes half of every 32 bytes: 1.2 times as long. With as many channels as keys other tiles have K's shape, and stay so
    NEIGHBOURS: tl.constexpr = 8 if D > KEY_BLOCK else 16
    ROWS: tl.constexpr = 32 * NEIGHBOURS // D * WARPS
    APART: tl.constexpr = ROWS if ROWS < 64 else 64
    # all heads of a block one after the other: in (B, N, H, D) their rows are neighbours in memory
    SLOT: tl.constexpr = 0 if HEADS_FIRST else 1
    blocks, block = tl.num_programs(1 - SLOT), tl.program_id(1 - SLOT)
    bh = first_head + tl.program_id(SLOT)
    tile = tl.program_id(SLOT).to(tl.int64) * blocks + block  # of the workspace, which holds this group's heads only
    keys = tokens - block * KEY_BLOCK
    # 32 bits: Triton divides 64 behind a branch, across which nothing is scheduled
    b = (bh // heads).to(tl.int64)
    head = (bh % heads).to(tl.int64)
    start = block.to(tl.int64) * KEY_BLOCK
    k_plane = k + b * k_stride_b + head * k_stride_h + start * k_stride_n
    v_plane = v + b * v_stride_b + head * v_stride_h + start * v_stride_n
    bh = bh.to(tl.int64)
    place, d = tl.arange(0, KEY_BLOCK), tl.arange(0, D)
    key = register_order_of_keys(place)
    rows = tl.minimum(key, keys - 1).to(tl.int64)
    k_at = tile_at(k_plane, rows, d, k_stride_n, k_stride_d)
    k_raw = tl.load(k_at, eviction_policy=EVICT_FIRST)  # [KEY_BLOCK, D]
    # of a program to come, which would wait for memory; V itself is loaded when K has left its registers
    later = tl.minimum(place + ahead, keys - 1).to(tl.int64)
    ask_for_rows(k_plane, later, k_stride_n, k_stride_d, D)
    ask_for_rows(v_plane, later, v_stride_n, v_stride_d, D)

    k_smooth = widened(k_raw) - tl.load(k_mean + bh * D + d)  # [KEY_BLOCK, D]
    balanced = tl.load(balance + bh * (2 * D) + d)
    if LINEAR:
        # before K's largest element, for which all warps wait
        exponentials = tl.exp2(k_smooth * LOG2_E - (tl.max(k_smooth, axis=1) * LOG2_E)[:, None])  # [KEY_BLOCK, D]
        share = tl.where(key < keys, 1.0 / (KEY_BLOCK * tl.sum(exponentials, axis=1)), 0.0)  # [KEY_BLOCK]
        phi = (exponentials * share[:, None]).to(TERMS)  # [KEY_BLOCK, D]
    largest = tl.maximum(_largest(_largest_of_rows(k_smooth, APART) * balanced[None, :]), MIN_MAGNITUDE)
    # the bias rounds, and the last byte of the sum is the INT8
    biased = k_smooth * (balanced * (INT8_MAX / largest))[None, :] + INT8_BIAS
    # not in a function of its own: what is said of a parameter is lost when Triton inlines it
    k_out = tl.max_contiguous(key[:, None] * D + d, [1, NEIGHBOURS])
    tl.store(packed_k + tile * (KEY_BLOCK * D) + k_out, _bits(biased).to(tl.int8))
    tl.store(k_scale + tile, largest / INT8_MAX)
    if LINEAR:
        rows += (share < 0).to(tl.int64)  # 0: without it V is loaded as early as K

    power = tl.load(v_channel + bh * D + d)
    v_at = tile_at(v_plane, rows, d, v_stride_n, v_stride_d)
    v_raw = tl.load(v_at, eviction_policy=EVICT_FIRST)  # [KEY_BLOCK, D]
    v_largest = _largest(_largest_of_rows(v_raw, APART) * _over_power(power, 0)[None, :])
    # INT8 has no NaN: one in V, or an infinity, goes on as that of the exponent and of z_j
    zero_or_nan = 0.0 * v_largest
    exponent = tl.maximum(tl.log2(tl.maximum(v_largest, 1e-30) * (1.001 / INT8_MAX)), MIN_EXPONENT) + zero_or_nan
    tl.store(v_exponent + tile, exponent)
    # so far up that |h_j|, at most V's largest element, is below 2^BOUND_LOG2
    up = BOUND_LOG2 + 126 - (_bits(tl.maximum(v_largest, MIN_LARGEST)) >> 23)
    even = widened(v_raw) * _over_power(power, up)[None, :]
    if v.dtype.element_ty == tl.bfloat16:
        even = even.to(tl.bfloat16)  # the same numbers in half the registers
    biased = even.to(tl.float32) * (tl.exp2(-exponent) * _power_of_two(-up)) + INT8_BIAS
    tl.store(
        packed_v + tile * (KEY_BLOCK * D) + place_of(d, D)[:, None] * KEY_BLOCK + place,
        tl.trans(_bits(biased).to(tl.int8)),
    )

    if LINEAR:
        h = tl.dot(tl.trans(phi), even.to(TERMS)).to(tl.float16)  # [D, D]
        ones = tl.full([KEY_BLOCK, 16], 1.0, dtype=TERMS)
        # z_j as a product, each column of it
        z = tl.max(tl.dot(tl.trans(phi), ones), axis=1) + zero_or_nan  # [D]
        tl.store(norms + tile * D + d, z.to(norms.dtype.element_ty))
        h_largest = _largest_half(h)
        h_exponent = tl.maximum(tl.ceil(tl.log2(tl.maximum(h_largest, 1e-30) * (1.00001 / INT8_MAX))), MIN_H_EXPONENT)
        tl.store(sums_exponent + tile, h_exponent - up.to(tl.float32))
        to_int8 = tl.exp2(-h_exponent).to(tl.float16)
        first, last = _groups(h, GROUP)
        part = tl.arange(0, GROUP)
        for p in tl.static_range(D // GROUP):
            h_out = sums + tile * (D * D) + row_at(d, WARPS)[:, None] * D + p * GROUP + part
            biased = half_biased(_stored_order(first if p == 0 else last, WARPS), to_int8)
            tl.store(h_out, bytes_of_halves(biased))


def int8_pack(k, v, k_mean, work, group, *, balance, v_channel):
    """As pack() in INT8, V's channels, h_j's columns with them, in the places of product_order.py. balance, v_channel: as in
    Pools."""
    heads, tokens, head_dim = k.shape[1:]
    config = configs.int8_pack_config(v.element_size(), head_dim)
    grid, heads_first, ahead = order_of_programs(tokens, group, config)
    launch(
        _int8_pack, grid,
        k, v, k_mean, balance, v_channel, work.packed_k, work.k_scale, work.packed_v, work.v_exponent, work.sums, work.sums_exponent, work.norms,
        *k.stride(), *v.stride(), heads, group.start, tokens, ahead,
        D=head_dim, LINEAR=work.sums is not None, GROUP=min(GROUP, head_dim), WARPS=min(config.num_warps, head_dim // 16),
        HEADS_FIRST=heads_first, options=config.options,
    )  # fmt: skip
