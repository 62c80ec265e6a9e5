"""The sparse loop of cards with mma.sync (compute capability 8 and 12) in INT8: Q K^T and P V, sums in INT32.

RTX cards multiply INT8 at full rate, FP8 and 16 bit that are summed in float32 at half of theirs. What an INT32 sum cannot
do is shrink by a factor when a row's maximum grows, so P is taken below a whole power of two, at or above the maximum:
when that grows, the sums shift right, behind a vote of the warp, since in most turns no row of 16 grows. They stay where the
matrix instructions put them from the first block to the last.

V is over a power of two per channel and head (channels.py), which the output gets back, and over 2^exponent per
block, which joins the scores: p V is what must fit. A row's sum is that of P before it is rounded: blocks of small values
may hold much of the mass.

Scores arrive as float32 INT8_BIAS + S, exactly (see sparse_attention.py). The row's maximum leaves with the multiply-add
before exp2, whose addend is rounded at the size of INT8_BIAS * slope; what that rounds away joins the multiply-add that
rounds P.

In 16 bit the linear branch comes last (_linear_and_mix): the output of the selected blocks waits in registers, two numbers in one
of them, and nothing waits in memory.
"""

import math
import struct

import triton
import triton.language as tl

from ..router import K_BLOCK, block_count
from ..support import triton_version
from .launch import launch
from .linear_attention import linear_rows, query_sums_of
from .numerics import (
    INT8_BIAS,
    INT8_BIAS_BITS,
    INT8_MAX,
    INTERPRETED,
    MIN_LINEAR_WEIGHT,
    MIN_MAGNITUDE,
    NO_SCORE,
    add_up,
)
from .pairs import bytes_of_halves, half_biased, in_pairs, of_pairs, widened
from .planes import EVICT_FIRST, KEY_BLOCK, ask_for_rows, plane_of, tile_at
from .product_order import channel_at, quarters_as_stored, row_at, rows_as_stored

P_LOG2_RANGE = 7.0
P_LOG2_ROOM = tl.constexpr(2.0**-6)  # of P's range: 2^(7 - room) is 126.6, and 2^7 is no INT8
# log2 of P per unit of S: more leaves nothing below the largest score either, not even in the row's sum
MAX_SLOPE = tl.constexpr(16.0)
# of the largest P in float16, give or take half of MAX_SLOPE, by which its addend is rounded at most
P_LOG2_HALF = tl.constexpr(2.0)
MIN_SLOPE = tl.constexpr(2.0**-80)  # less makes one of all scores as well, and times NO_SCORE still leaves no P
LINEAR_ROWS = 64  # of the linear branch, at a time
MAX_SHIFT = tl.constexpr(31.0)  # of INT32
COLUMNS = tl.constexpr(8)  # of the matrix instruction's tile of scores
SHIFTED = 64  # sums per thread behind one vote: 16 rows of a warp, 128 channels
MASKED = 32  # scores per thread behind one branch: 16 rows of a warp, 64 keys
TILES_AHEAD = tl.constexpr(32)  # so far ahead L2 is asked for Q, 1 MB
NO_SCORE_BITS = hex(struct.unpack("I", struct.pack("f", NO_SCORE.value))[0])


def _shift_right(values):
    """PTX that shifts ``values`` registers right, each by one of its own, and jumps over that where a warp's are all zero."""
    shifts = range(2 * values, 3 * values)
    return "\n".join(
        ["{", ".reg .pred grows;", ".reg .b32 any;", "mov.b32 any, 0;"]
        + [f"or.b32 any, any, ${shift};" for shift in shifts]
        + ["setp.ne.s32 grows, any, 0;", "vote.sync.any.pred grows, grows, 0xffffffff;", "@!grows bra done;"]
        + [f"shr.s32 ${i}, ${i}, ${shift};" for i, shift in enumerate(shifts)]
        + ["done:", "}"]
    )


def _mask(values):
    """PTX that makes NO_SCORE of those of ``values`` registers whose key is not below the number of keys, and jumps over that
    where the key block is whole."""
    keys = 3 * values
    return "\n".join(
        ["{", ".reg .pred whole, inside;", f"setp.ge.s32 whole, ${keys}, {K_BLOCK};", "@whole bra done;"]
        + [
            f"setp.lt.s32 inside, ${2 * values + i}, ${keys};\nselp.b32 ${i}, ${i}, {NO_SCORE_BITS}, inside;"
            for i in range(values)
        ]
        + ["done:", "}"]
    )


def _changed(values, others):
    """Constraints of inline assembly that changes ``values`` registers and reads ``others`` more."""
    return ",".join(["=r"] * values + list(map(str, range(values))) + ["r"] * others)


SHIFT_RIGHT = tl.constexpr(_shift_right(SHIFTED))
SHIFT_REGISTERS = tl.constexpr(_changed(SHIFTED, SHIFTED))
SHIFT_PACK = tl.constexpr(SHIFTED)
MASK = tl.constexpr(_mask(MASKED))
MASK_REGISTERS = tl.constexpr(_changed(MASKED, 2 * MASKED))
MASK_PACK = tl.constexpr(MASKED)


@triton.jit
def _quantize_queries(q, balance):
    """A query tile in INT8 and its one scale; balance: what its channels are multiplied with first."""
    wide = widened(q)
    # channel by channel first, over every eighth row, which is what a thread reads: the balance then meets 8 rows, not all
    of_channels = tl.max(tl.abs(wide).reshape([q.shape[0] // 8, 8, q.shape[1]]), axis=0)
    largest = tl.maximum(tl.max(of_channels * balance[None, :]), MIN_MAGNITUDE)
    biased = wide * (balance * (INT8_MAX / largest))[None, :] + INT8_BIAS
    return biased.to(tl.int32, bitcast=True).to(tl.int8), largest / INT8_MAX


@triton.jit
def _rows_at(columns, part, tokens, stride_n, stride_d, LINEAR_ROWS: tl.constexpr):
    rows = tl.minimum(part * LINEAR_ROWS + tl.arange(0, LINEAR_ROWS), tokens - 1)
    return tile_at(columns, rows.to(tl.int64), 0, stride_n, stride_d)


@triton.jit
def _scores(q, k_at):
    """INT8_BIAS + Q K^T, [rows, keys]."""
    k = tl.load(k_at)  # [D, keys]
    start = tl.full([q.shape[0], k.shape[1]], INT8_BIAS_BITS, dtype=tl.int32)
    return tl.dot(q, k, acc=start, out_dtype=tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _fma(x, y, z):
    """x * y + z, rounded once; in float64 in Triton's interpreter, which rounds twice."""
    if INTERPRETED:
        found = (x.to(tl.float64) * y + z).to(tl.float32)
    else:
        found = tl.fma(x, y, z)
    return found


@triton.jit
def _probabilities(scores, slope, offset, factor):
    """P in INT8, its keys in the order of the matrix instruction's registers, and sums of P over ``factor``, float32 [rows, COLUMNS].

    P over its factor is in float16: two numbers at a time are added up, multiplied and rounded.
    """
    ROWS: tl.constexpr = scores.shape[0]
    KEYS: tl.constexpr = scores.shape[1]
    p = tl.exp2(_fma(scores, slope, offset[:, None])).to(tl.float16)
    # over what lies in one column of the tiles, and so in one register, as all sums do: the columns are added up behind the loop
    sums = add_up(p.reshape([ROWS, KEYS // COLUMNS, COLUMNS]), 1).to(tl.float32)
    biased = half_biased(p, factor.to(tl.float16)[:, None])
    ordered = biased.reshape([ROWS, KEYS // 16, 2, 4, 2]).permute([0, 1, 3, 2, 4])
    return bytes_of_halves(ordered.reshape([ROWS, KEYS])), sums


@triton.jit
def _shifted(acc, shift):
    """acc [rows, D] >> shift [rows]."""
    # a vote on fewer sums per thread costs more than it saves
    if INTERPRETED or acc.shape[1] != 128:
        found = acc >> shift[:, None]
    else:
        # not pure: the vote must stay where the whole warp comes by
        found = tl.inline_asm_elementwise(
            SHIFT_RIGHT, SHIFT_REGISTERS, [acc, shift[:, None]], dtype=tl.int32, is_pure=False, pack=SHIFT_PACK
        )
    return found


@triton.jit
def _of_keys(scores, keys):
    """scores [rows, KEY_BLOCK], those past the first ``keys`` as NO_SCORE."""
    key = tl.arange(0, KEY_BLOCK)[None, :]
    if INTERPRETED:
        found = tl.where(key < keys, scores, NO_SCORE)
    else:
        # an if of Triton's would part the waits for K and V, a barrier more in each turn
        found = tl.inline_asm_elementwise(
            MASK, MASK_REGISTERS, [scores, key, keys], dtype=tl.float32, is_pure=True, pack=MASK_PACK
        )
    return found


@triton.jit
def _attend_block(
    j, keys, q, q_scale, acc, rest, row_max, row_sum, packed_k, k_scale, packed_v, v_exponent, log2_range,
    D: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """One key block, of which the first ``keys`` count. acc [rows, PART]: sums of V's first PART places; rest: of the others, if any."""
    key, d = tl.arange(0, KEY_BLOCK), tl.arange(0, D)
    scores = _scores(q, packed_k + j * (KEY_BLOCK * D) + key[None, :] * D + d[:, None])
    unit = q_scale * tl.load(k_scale + j)
    exponent = tl.load(v_exponent + j)
    # the list of key blocks ascends, so only its last one can be ragged: other turns jump over the masks
    scores = _of_keys(scores, keys)
    # as integers: cards from Hopper on compare three of them at a time
    highest = tl.max(scores.to(tl.int32, bitcast=True), axis=1).to(tl.float32, bitcast=True)  # [rows]
    block_max = (highest - INT8_BIAS) * unit + exponent
    new_max = tl.maximum(row_max, tl.ceil(block_max))
    slope = tl.maximum(tl.minimum(unit, MAX_SLOPE), MIN_SLOPE)
    largest_p = tl.minimum(block_max - new_max, -P_LOG2_ROOM) + log2_range  # log2
    offset = _fma(-slope, highest, P_LOG2_HALF)
    factor = tl.exp2(largest_p - _fma(slope, highest, offset))
    p, block_sum = _probabilities(scores, slope, offset, factor)
    block_sum *= (factor * tl.exp2(-exponent))[:, None]

    v_at = packed_v + j * (KEY_BLOCK * D) + key[:, None] + tl.arange(0, PART)[None, :] * KEY_BLOCK
    v = tl.load(v_at)
    if PART < D:
        v_rest = tl.load(v_at + PART * KEY_BLOCK)
    row_sum = row_sum * tl.exp2(row_max - new_max)[:, None] + block_sum
    # nothing is left of an INT32 beyond; the row's sum has no such end: an empty V block's exponent is far below others
    shift = tl.minimum(new_max - row_max, MAX_SHIFT)
    # the bias leaves the whole number in the last bits; a conversion would wait behind the loads of V
    bits = (shift + INT8_BIAS).to(tl.int32, bitcast=True) & 31
    acc = tl.dot(p, v, acc=_shifted(acc, bits), out_dtype=tl.int32)
    if PART < D:
        rest = tl.dot(p, v_rest, acc=_shifted(rest, bits), out_dtype=tl.int32)
    return acc, rest, new_max, row_sum


@triton.jit
def _part_of(x, part, LINEAR_ROWS: tl.constexpr):
    """Rows ``part`` of x [rows, ...], LINEAR_ROWS of them, of at most twice as many: by a select, as they are in registers."""
    found = x
    if x.shape[0] > LINEAR_ROWS:
        if len(x.shape) == 1:
            first, second = x.reshape([2, LINEAR_ROWS]).permute([1, 0]).split()
        else:
            first, second = x.reshape([2, LINEAR_ROWS, x.shape[1]]).permute([1, 2, 0]).split()
        found = tl.where(part == 0, first, second)
    return found


@triton.jit
def _linear_and_mix(
    o_sparse, of_sparse, selected_mass, q_columns, out_plane, sums, of_block, ratio, q_tokens,
    q_stride_n, q_stride_d, out_stride_n, out_stride_d,
    D: tl.constexpr, ESTIMATED: tl.constexpr, LINEAR_ROWS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """The linear branch of a tile and its mix with the selected blocks' output into out_plane; each row's ratio into ``ratio``.

    o_sparse float32 [rows, D]: that output over of_sparse [rows]. selected_mass [rows]: log2, where ratios are ESTIMATED. sums: H_i and
    Z_i of the query block. of_block: its ratio, unless ESTIMATED.
    """
    ROWS: tl.constexpr = o_sparse.shape[0]
    like: tl.constexpr = out_plane.dtype.element_ty
    d = tl.arange(0, D)
    waiting = in_pairs(o_sparse, like)
    # before H_i, which goes to shared memory as soon as it has come
    loaded = tl.load(_rows_at(q_columns, 0, q_tokens, q_stride_n, q_stride_d, LINEAR_ROWS), eviction_policy=EVICT_FIRST)
    h, z = query_sums_of(sums, 0, d, D)
    PART: tl.constexpr = D if D < 32 else 32
    # not written out: H_i would be read from shared memory once for both parts, and spilled
    for part in tl.range(0, ROWS // LINEAR_ROWS, num_stages=1):
        queries = loaded
        # beside this part's products. Were each loaded in its own turn, ptxas would also read V later in the sparse loop: 5% of its time
        if part + 1 < ROWS // LINEAR_ROWS:
            loaded = tl.load(
                _rows_at(q_columns, part + 1, q_tokens, q_stride_n, q_stride_d, LINEAR_ROWS),
                eviction_policy=EVICT_FIRST,
            )
        product, weight = linear_rows(queries, h, z, True)
        weightless = weight < MIN_LINEAR_WEIGHT
        rows = part * LINEAR_ROWS + tl.arange(0, LINEAR_ROWS)
        inside = rows < q_tokens
        if ESTIMATED:
            # softmax's share of the whole mass; the mass of the unselected blocks waits where the ratio goes
            unselected_mass = tl.load(ratio + rows, mask=inside, other=0.0)
            share = 1.0 / (1.0 + tl.exp2(unselected_mass - _part_of(selected_mass, part, LINEAR_ROWS)))
        else:
            share = tl.full([LINEAR_ROWS], 1.0, tl.float32) * of_block
        row_ratio = tl.where(weightless, 1.0, share)
        tl.store(ratio + rows, row_ratio, mask=inside)
        of_linear = tl.where(weightless, 0.0, (1.0 - row_ratio) / weight)
        mixed = (
            of_pairs(_part_of(waiting, part, LINEAR_ROWS), like)
            * (row_ratio * _part_of(of_sparse, part, LINEAR_ROWS))[:, None]
            + product * of_linear[:, None]
        )
        first, second, third, fourth = quarters_as_stored(mixed.to(like), WARPS)
        stored = row_at(tl.arange(0, LINEAR_ROWS), WARPS) + part * LINEAR_ROWS
        out_at = tile_at(out_plane, stored.to(tl.int64), tl.arange(0, PART), out_stride_n, out_stride_d)
        for quarter in tl.static_range(D // PART):
            values = first if quarter == 0 else second if quarter == 1 else third if quarter == 2 else fourth
            tl.store(out_at, values, mask=(stored < q_tokens)[:, None], eviction_policy=EVICT_FIRST)
            out_at += PART * out_stride_d


@triton.jit(do_not_specialize=["heads", "first_head", "q_tokens", "k_tokens", "count"])
def _int8_sparse_attention(
    q, out, packed_k, k_scale, packed_v, v_exponent, balance, v_channel, selected, sums, block_ratio, ratio,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, out_stride_b, out_stride_h, out_stride_n, out_stride_d,
    heads, first_head, q_tokens, k_tokens, count, scale_log2, log2_range,
    D: tl.constexpr, TILE: tl.constexpr, QUERY_BLOCK: tl.constexpr, RATIO_KIND: tl.constexpr,
    LINEAR_ROWS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    tile, slot = tl.program_id(0), tl.program_id(1).to(tl.int64)
    bh = first_head + slot
    row, d = tl.arange(0, TILE), tl.arange(0, D)
    rows = row.to(tl.int64)
    q_blocks, q_block = tl.cdiv(q_tokens, QUERY_BLOCK), tile * TILE // QUERY_BLOCK
    # planes that begin with the tile: their rows' numbers stay small
    start = (tile * TILE).to(tl.int64)
    q_plane = plane_of(q, bh, heads, q_stride_b, q_stride_h) + start * q_stride_n
    out_plane = plane_of(out, bh, heads, out_stride_b, out_stride_h) + start * out_stride_n
    ratio += bh * q_tokens + start
    q_tokens -= tile * TILE
    # where the tile is ragged its last row stands in for those past the end, without masks; columns before rows saves additions
    q_rows = tl.minimum(row, q_tokens - 1).to(tl.int64)
    q_columns = (q_plane + d * q_stride_d)[None, :]
    if LINEAR_ROWS > 0:
        sums += (slot * q_blocks + q_block) * ((D + 1) * D)
        # for what a program to come starts with
        later = tl.minimum(row + TILES_AHEAD * TILE, q_tokens - 1).to(tl.int64)
        ask_for_rows(q_plane, later, q_stride_n, q_stride_d, D)
    q_at = tile_at(q_columns, q_rows, 0, q_stride_n, q_stride_d)
    queries = tl.load(q_at)
    q_tile, q_scale = _quantize_queries(queries, tl.load(balance + bh * (2 * D) + D + d))  # [TILE, D]
    q_scale = q_scale * scale_log2
    k_blocks = tl.cdiv(k_tokens, KEY_BLOCK)
    packed_k += slot * k_blocks * (KEY_BLOCK * D)
    packed_v += slot * k_blocks * (KEY_BLOCK * D)
    k_scale += slot * k_blocks
    v_exponent += slot * k_blocks

    # in two halves where they would be wider than high: there Triton shares out the columns among the warps, and P crosses them
    PLACES: tl.constexpr = D // 2 if D > TILE else D
    acc = tl.zeros([TILE, PLACES], dtype=tl.int32)
    rest = acc if PLACES < D else 0
    row_max = tl.full([TILE], NO_SCORE, dtype=tl.float32)
    row_sum = tl.zeros([TILE, COLUMNS], dtype=tl.float32)
    selected += (bh * q_blocks + q_block) * count
    of_last = k_tokens - tl.load(selected + count - 1) * KEY_BLOCK  # 64 or more, or the keys of a ragged block
    # the maximum tells ptxas that the loop runs: it would otherwise wait for every single matrix instruction
    for i in range(tl.maximum(count, 1)):
        j = tl.load(selected + i).to(tl.int64)
        acc, rest, row_max, row_sum = _attend_block(
            j, of_last if i == count - 1 else KEY_BLOCK, q_tile, q_scale, acc, rest, row_max, row_sum,
            packed_k, k_scale, packed_v, v_exponent, log2_range, D, PLACES,
        )  # fmt: skip

    if PLACES < D:
        acc = tl.join(acc, rest).permute([0, 2, 1]).reshape([TILE, D])
    norm = tl.sum(row_sum, axis=1)
    of_channels = tl.load(v_channel + bh * D + channel_at(d, D))[None, :]
    selected_mass = row_max + tl.log2(norm) - log2_range
    if LINEAR_ROWS > 0:
        o_sparse = acc.to(tl.float32) * of_channels
        of_sparse = 1.0 / norm
        if out.dtype.element_ty == tl.float16:
            # which does not hold sums that are not divided yet
            o_sparse = o_sparse * of_sparse[:, None]
            of_sparse = tl.full([TILE], 1.0, dtype=tl.float32)
        _linear_and_mix(
            o_sparse, of_sparse, selected_mass, q_columns, out_plane, sums,
            1.0 if block_ratio is None else tl.load(block_ratio + bh * q_blocks + q_block), ratio, q_tokens,
            q_stride_n, q_stride_d, out_stride_n, out_stride_d, D, block_ratio is None, LINEAR_ROWS, WARPS,
        )  # fmt: skip
    else:
        # The mix is that of sparse_attention.py, written out: in a function that both call, ptxas spills 64 bytes more of this loop.
        inside = row < q_tokens
        ratio_at = ratio + rows
        if RATIO_KIND == "none":
            row_ratio = tl.full([TILE], 1.0, dtype=tl.float32)
        elif RATIO_KIND == "estimated":
            # softmax's share of the whole mass; the mass of the unselected blocks waits where the ratio goes
            row_ratio = 1.0 / (1.0 + tl.exp2(tl.load(ratio_at, mask=inside, other=0.0) - selected_mass))
        else:
            row_ratio = tl.load(ratio_at, mask=inside, other=1.0)
        first, second, third, fourth = quarters_as_stored(
            acc.to(tl.float32) * of_channels * (row_ratio / norm)[:, None], WARPS
        )
        of_linear = rows_as_stored(1.0 - row_ratio, WARPS)[:, None]
        stored_rows = row_at(row, WARPS)
        stored = (stored_rows < q_tokens)[:, None]
        PART: tl.constexpr = D if D < 32 else 32
        out_at = tile_at(out_plane, stored_rows.to(tl.int64), tl.arange(0, PART), out_stride_n, out_stride_d)
        for part in tl.static_range(D // PART):
            mixed = first if part == 0 else second if part == 1 else third if part == 2 else fourth
            if RATIO_KIND != "none":
                mixed += tl.load(out_at, mask=stored, other=0.0, eviction_policy=EVICT_FIRST).to(tl.float32) * of_linear
            tl.store(out_at, mixed.to(out.dtype.element_ty), mask=stored, eviction_policy=EVICT_FIRST)
            out_at += PART * out_stride_d
        tl.store(ratio_at, row_ratio, mask=inside)


def p_log2_range(count):
    """log2 of P's range with ``count`` key blocks per query block: 7, or less where INT32 could not hold the sums."""
    bits = 2 * P_LOG2_RANGE + math.log2(K_BLOCK * count)
    return P_LOG2_RANGE - max(0, math.ceil(bits - 31))


def takes_linear_branch(q):
    """Whether the loop's programs compute the linear branch too: in 16 bit; float32's does not fit beside the loop. With Triton 3.2,
    which reshapes by way of shared memory, 16 bit does not either: up to 1.1 KB spilled."""
    return q.element_size() == 2 and triton_version() >= (3, 3)


def int8_sparse_attention(
    q, k_tokens, out, work, pools, selected, block_ratio, ratio, group, *, query_block, ratio_kind, scale_log2, config
):
    """Writes out (B, H, N, D) and ratio (B, H, N) for the heads of slice ``group``.

    work: the packed key blocks (Workspace), V in INT8. pools: its balance and v_channel. selected,
    ratio_kind: as in sparse_attention(). block_ratio: as in linear_attention(), which must run before where
    takes_linear_branch() is False.
    """
    heads, tokens, head_dim = q.shape[1:]
    count = selected.shape[2]
    along = ratio_kind != "none" and takes_linear_branch(q)
    launch(
        _int8_sparse_attention, (block_count(tokens, config.tile_m), group.stop - group.start),
        q, out, work.packed_k, work.k_scale, work.packed_v, work.v_exponent, pools.balance, pools.v_channel, selected,
        work.query_sums, block_ratio, ratio, *q.stride(), *out.stride(),
        heads, group.start, tokens, k_tokens, count, scale_log2, p_log2_range(count),
        D=head_dim, TILE=config.tile_m, QUERY_BLOCK=query_block, RATIO_KIND=ratio_kind,
        LINEAR_ROWS=LINEAR_ROWS if along else 0,
        WARPS=min(config.num_warps, config.tile_m // 16), options=config.options,
    )  # fmt: skip
