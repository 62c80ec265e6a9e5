"""The sparse loop and the linear branch for Hopper (sm_90) in Gluon: a producer warp and its consumer warpgroups, persistent.

The producer brings Q tiles and pairs of selected key blocks by TMA through a ring of stages; each consumer holds 64
rows, half a query block or a whole one. In each step the scores of this pair and P V of the pair before are under way while
the consumer takes exponentials. H_i comes last through the same ring, and phi(Q_i) H_i is taken beside the last P V. The
arithmetic is that of sparse_attention.py and linear_attention.py, but for Q's scale, which is one per row, and for a row's
maximum, which stays until a score exceeds it by ROOM: in most steps nothing is rescaled.

In 8 bit two programs of one consumer share a multiprocessor: faster than one program of two, although for query blocks of
128 both bring the same key blocks. In 16 bit there is shared memory for one program, of two consumers.

P V's left operand stays in the registers that the scores came in: pack(register_order=True) puts V's keys in the order in
which those registers are an FP8 operand, and V's channels, with them H_i's columns, in the one that gives each thread eight
neighbours of the output.

Here and below, "int8" stands for INT8 scores and FP8 P V, "16bit" for both products in 16 bit.
"""

from dataclasses import dataclass

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..router import K_BLOCK, Q_BLOCK, block_count
from .gluon_shared import (
    keep,
    leave,
    load_async,
    new_barriers,
    programs,
    reinterpret,
    stage_of,
    wait_empty,
    wait_full,
)
from .launch import launch
from .numerics import INT8_BIAS, INT8_MAX, LOG2_E, MIN_LINEAR_WEIGHT, MIN_MAGNITUDE, NO_SCORE, P_LOG2_RANGE

HEAD_DIM = 128
D = gl.constexpr(HEAD_DIM)
BLOCK = gl.constexpr(K_BLOCK)
HALF = gl.constexpr(Q_BLOCK // 2)  # query rows of a consumer
ROOM = gl.constexpr(0.75)  # log2 of what a score may exceed the maximum by: P reaches 2^8.75, and E4M3 holds 2^8.8
SUMS = 64  # of the output, per thread


def _rescale(values):
    """PTX that multiplies ``values`` registers by one each, unless the first of the last ``values`` registers is 0."""
    factors = range(2 * values, 3 * values)
    return "\n".join(
        ["{", ".reg .pred changes;", f"setp.ne.s32 changes, ${3 * values}, 0;", "@!changes bra done;"]
        + [f"mul.f32 ${i}, ${i}, ${factor};" for i, factor in enumerate(factors)]
        + ["done:", "}"]
    )


RESCALE = gl.constexpr(_rescale(SUMS))
RESCALE_REGISTERS = gl.constexpr(",".join(["=f"] * SUMS + list(map(str, range(SUMS))) + ["f"] * SUMS + ["r"] * SUMS))
RESCALED = gl.constexpr(SUMS)


@dataclass(frozen=True)
class Program:
    """consumers: warpgroups that multiply. stages, q_stages: pairs of key blocks and Q tiles in flight, as many as fit.

    resident: programs per multiprocessor. options: Triton's.
    """

    consumers: int
    stages: int
    q_stages: int
    resident: int
    options: dict


PROGRAMS = {
    "int8": Program(1, 3, 1, resident=2, options={"num_warps": 4, "maxnreg": 128}),
    "16bit": Program(2, 3, 1, resident=1, options={"num_warps": 4}),
}


@gluon.constexpr_function
def _accumulator(columns, depth):
    """Layout of a (64, columns) accumulator of one warpgroup; depth: of its matrix instruction along the sum."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, depth])


@gluon.constexpr_function
def _depth(qk):
    return 32 if qk == "int8" else 16


@gluon.constexpr_function
def _lanes():
    """(64, 4): what each of the four threads that share a row holds of it."""
    return gl.DistributedLinearLayout(
        reg_bases=[[8, 0]], lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], warp_bases=[[16, 0], [32, 0]],
        block_bases=[], shape=[64, 4],
    )  # fmt: skip


@gluon.constexpr_function
def _stored(qk):
    """The output's registers once its columns are in order: in 8 bit eight neighbours a thread."""
    if qk != "int8":
        return _accumulator(HEAD_DIM, 16)
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 32], [0, 64], [8, 0]], lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]], block_bases=[], shape=[64, 128],
    )  # fmt: skip


@gluon.jit
def _first_pair_at(row, count):
    """Where step 0's pair is listed: the last block, which alone may be ragged, and for even counts the first."""
    return row + count - 1, row + gl.where(count % 2 == 0, 0, count - 1)


@gluon.jit
def _half_of_sums(smem, stage, QK: gl.constexpr):
    """Room for 64 rows of H_i, bfloat16 (64, D), where a stage of ``smem`` has tiles of its pair: both in 8 bit, one in 16."""
    TILES: gl.constexpr = smem.shape[0] // (2 if QK == "int8" else 1)
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=4)
    tiles = reinterpret(smem, gl.bfloat16, [TILES, 1, 1, BLOCK, D], LAYOUT)
    return tiles.index(stage if QK == "int8" else 2 * stage)


@gluon.jit
def _place_of(tile, q_blocks, CONSUMERS: gl.constexpr, QUERY_BLOCK: gl.constexpr):
    """(head of the group, query block, first 64 rows of this tile among those of its head)."""
    TILES: gl.constexpr = QUERY_BLOCK // (CONSUMERS * HALF)  # of a query block
    slot = tile // (q_blocks * TILES)
    place = tile % (q_blocks * TILES)
    return slot, place // TILES, place * CONSUMERS


@gluon.jit
def _produce(
    descriptors, q_ring, kv_ring, selected, sizes, QUERY_BLOCK: gl.constexpr, QK: gl.constexpr, LINEAR: gl.constexpr
):  # fmt: skip
    """One warp: fills a stage of the Q ring per tile, a stage of the K and V ring per step, and one more with H_i."""
    q_desc, k_desc, v_desc, h_desc = descriptors
    q_smem, q_full, q_empty = q_ring
    k_smem, v_smem, full, empty = kv_ring
    heads, first_head, q_blocks, count, tiles = sizes
    CONSUMERS: gl.constexpr = q_smem.shape[0] // q_full.shape[0]
    Q_BYTES: gl.constexpr = CONSUMERS * HALF * D * q_desc.dtype.primitive_bitwidth // 8
    PAIR_BYTES: gl.constexpr = 4 * BLOCK * D * k_desc.dtype.primitive_bitwidth // 8
    SUMS_BYTES: gl.constexpr = D * D * 2
    V_ROWS: gl.constexpr = D if QK == "int8" else BLOCK
    turn = 0
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        slot, q_block, half = _place_of(tile, q_blocks, CONSUMERS, QUERY_BLOCK)
        bh = first_head + slot
        place = wait_empty(q_empty, turn)
        q_bar = q_full.index(place)
        mbarrier.expect(q_bar, Q_BYTES)
        for part in gl.static_range(CONSUMERS):
            at = [bh // heads, bh % heads, (half + part) * HALF, 0]
            load_async(q_desc, at, q_bar, q_smem.index(CONSUMERS * place + part))
        turn += 1
        row = selected + (bh.to(gl.int64) * q_blocks + q_block) * count
        at0, at1 = _first_pair_at(row, count)
        if QK == "int8":
            batch = 0
            head = slot
        else:
            batch = bh // heads
            head = bh % heads
        for s in range((count + 1) // 2):
            j0 = gl.load(at0)
            j1 = gl.load(at1)
            stage = wait_empty(empty, step)
            bar = full.index(stage)
            mbarrier.expect(bar, PAIR_BYTES)
            load_async(k_desc, [batch, head, j0 * BLOCK, 0], bar, k_smem.index(2 * stage))
            load_async(k_desc, [batch, head, j1 * BLOCK, 0], bar, k_smem.index(2 * stage + 1))
            load_async(v_desc, [batch, head, j0 * V_ROWS, 0], bar, v_smem.index(2 * stage))
            load_async(v_desc, [batch, head, j1 * V_ROWS, 0], bar, v_smem.index(2 * stage + 1))
            at0 = row + 2 * s + 1 - count % 2
            at1 = at0 + 1
            step += 1
        if LINEAR:
            stage = wait_empty(empty, step)
            bar = full.index(stage)
            mbarrier.expect(bar, SUMS_BYTES)
            load_async(h_desc, [0, slot * q_blocks + q_block, 0, 0], bar, _half_of_sums(k_smem, stage, QK))
            load_async(h_desc, [0, slot * q_blocks + q_block, BLOCK, 0], bar, _half_of_sums(v_smem, stage, QK))
            step += 1


@gluon.jit
def _quantized_queries(q_at, balance, layout: gl.constexpr):
    """Half a query block as INT8, the left operand of Q K^T, and its scale per row; balance: as in _queries."""
    factors = gl.load(balance + gl.arange(0, D, gl.SliceLayout(0, layout)))
    wide = q_at.load(layout).to(gl.float32) * factors[None, :]
    largest = gl.maximum(gl.max(gl.abs(wide), 1), MIN_MAGNITUDE)
    # the bias rounds, and the last byte of the sum is the INT8
    biased = wide * (INT8_MAX / largest)[:, None] + INT8_BIAS
    return biased.to(gl.int32, bitcast=True).to(gl.int8), largest / INT8_MAX


@gluon.jit
def _queries(q_at, balance, scale_log2, QK: gl.constexpr):
    """The left operand of Q K^T, and what its scores are multiplied with: a number, or one per row.

    balance: where the factors lie that INT8's channels are multiplied with first.
    """
    SCORES: gl.constexpr = _accumulator(BLOCK, _depth(QK))
    if QK == "int8":
        q, scale = _quantized_queries(q_at, balance, gl.DotOperandLayout(0, _accumulator(2 * BLOCK, 32), 4))
        factor = scale_log2 * gl.convert_layout(scale, gl.SliceLayout(1, SCORES))
    else:
        q = q_at
        factor = scale_log2
    return q, factor


@gluon.jit
def _start_scores(q, k_smem, stage, QK: gl.constexpr):
    """Q K^T of a pair of key blocks, under way; in INT8 both at once."""
    if QK == "int8":
        pairs = reinterpret(k_smem, gl.int8, [k_smem.shape[0] // 2, 2 * BLOCK, D], gl.NVMMASharedLayout(128, 8))
        k = pairs.index(stage).permute([1, 0])
        zeros = gl.zeros([HALF, 2 * BLOCK], gl.int32, _accumulator(2 * BLOCK, 32))
        t0 = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
        t1 = t0
    else:
        k0 = k_smem.index(2 * stage).reshape([BLOCK, D]).permute([1, 0])
        k1 = k_smem.index(2 * stage + 1).reshape([BLOCK, D]).permute([1, 0])
        zeros = gl.zeros([HALF, BLOCK], gl.float32, _accumulator(BLOCK, 16))
        t0 = warpgroup_mma(q, k0, zeros, use_acc=False, is_async=True)
        t1 = warpgroup_mma(q, k1, zeros, use_acc=False, is_async=True)
    return t0, t1


@gluon.jit
def _finish_scores(t0, t1, pending: gl.constexpr, QK: gl.constexpr):
    """The scores of both blocks (64, BLOCK), float32 or INT32, once at most ``pending`` later products are under way."""
    if QK == "int8":
        t = warpgroup_mma_wait(pending, [t0])
        s0, s1 = t.reshape([t.shape[0], 2, t.shape[1] // 2]).permute([0, 2, 1]).split()
        s0 = gl.convert_layout(s0, _accumulator(BLOCK, 32))
        s1 = gl.convert_layout(s1, _accumulator(BLOCK, 32))
    else:
        s0, s1 = warpgroup_mma_wait(pending, [t0, t1])
    return s0, s1


@gluon.jit
def _to_operand(p, dtype: gl.constexpr, QK: gl.constexpr):
    """P (64, BLOCK) as the left operand of P V, without moving anything between threads."""
    LAYOUT: gl.constexpr = gl.DotOperandLayout(0, _accumulator(D, _depth(QK)), 4 if QK == "int8" else 2)
    if QK == "int8":
        p = p.reshape([HALF, BLOCK // 16, 2, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([HALF, BLOCK])
        # Triton's own conversion takes the bytes apart and together again: 3 instructions where 1 does
        packed = gl.inline_asm_elementwise(
            """
            {
            .reg .b16 low, high;
            cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
            cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
            mov.b32 $0, {low, high};
            }
            """,
            "=r,f,f,f,f", [gl.convert_layout(p, LAYOUT)], dtype=gl.int8, is_pure=True, pack=4,
        )  # fmt: skip
        operand = packed.to(gl.float8e4nv, bitcast=True)
    else:
        operand = gl.convert_layout(p.to(dtype), LAYOUT)
    return operand


@gluon.jit
def _start_output(operand, v_smem, place, acc, QK: gl.constexpr):
    """acc + P V of one key block, under way."""
    if QK == "int8":
        v = v_smem.index(place).reshape([D, BLOCK]).permute([1, 0])
    else:
        v = v_smem.index(place).reshape([BLOCK, D])
    return warpgroup_mma(operand, v, acc, is_async=True)


@gluon.jit
def _start_pair_output(p0, p1, v_smem, stage, acc, dtype: gl.constexpr, QK: gl.constexpr):
    """acc + P V of a pair, under way, and its operands, which must be kept until it is done."""
    a0 = _to_operand(p0, dtype, QK)
    a1 = _to_operand(p1, dtype, QK)
    acc_t = _start_output(a0, v_smem, 2 * stage, acc, QK)
    acc_t = _start_output(a1, v_smem, 2 * stage + 1, acc_t, QK)
    return acc_t, a0, a1


@gluon.jit
def _keep_pair(a0, a1, QK: gl.constexpr):
    BITS: gl.constexpr = 8 if QK == "int8" else 16
    keep(a0, BITS)
    keep(a1, BITS)


@gluon.jit
def _lane_sums(p):
    """Sums of each row's columns that lie in the same thread, (64, 4): the four threads of a row meet only at the end."""
    p = p.reshape([p.shape[0], p.shape[1] // 8, 4, 2])
    return gl.convert_layout(gl.sum(gl.sum(p, 3), 1), _lanes())


@gluon.jit
def _lane_maxima(x):
    """As _lane_sums, the largest, float32; of integers the card compares three at a time."""
    x = x.reshape([x.shape[0], x.shape[1] // 8, 4, 2])
    return gl.convert_layout(gl.max(gl.max(x, 3), 1), _lanes()).to(gl.float32)


@gluon.jit
def _rescaled(acc, correction):
    """acc (64, D) times a number per row, jumped over by warps whose rows all have 1."""
    correction = gl.convert_layout(correction, gl.SliceLayout(1, acc.type.layout))
    changes = gl.inline_asm_elementwise(
        """
        {
        .reg .pred changes, other;
        setp.neu.f32 changes, $2, 0f3f800000;
        setp.neu.f32 other, $3, 0f3f800000;
        or.pred changes, changes, other;
        vote.sync.any.pred changes, changes, 0xffffffff;
        selp.b32 $0, 1, 0, changes;
        mov.b32 $1, $0;
        }
        """,
        "=r,=r,f,f", [correction], dtype=gl.int32, is_pure=False, pack=2,
    )  # fmt: skip
    return gl.inline_asm_elementwise(
        RESCALE, RESCALE_REGISTERS, [acc, correction[:, None], changes[:, None]], dtype=gl.float32, is_pure=False, pack=RESCALED
    )  # fmt: skip


@gluon.jit
def _column(x, layout: gl.constexpr):
    """A row's value for all its columns in ``layout``; a number stays one."""
    if x.type.is_block():
        return gl.convert_layout(x, gl.SliceLayout(1, layout))[:, None]
    else:
        return x


@gluon.jit
def _factors(at, scales, exponents, q_scale, QK: gl.constexpr):
    """(score factor, V's exponent) of the key block listed at ``at``."""
    if QK == "int8":
        j = gl.load(at)
        factor = q_scale * gl.load(scales + j)
        exponent = gl.load(exponents + j)
    else:
        factor = q_scale
        exponent = 0.0
    return factor, exponent


@gluon.jit
def _log2_range(QK: gl.constexpr):
    return P_LOG2_RANGE if QK == "int8" else gl.constexpr(0.0)


@gluon.jit
def _first_pair(listed, q, q_scale, scales, exponents, kv_ring, step, count, k_tokens, QK: gl.constexpr):
    """Step 0 of the online softmax: (P of both blocks, maximum of each row, sum of each row and lane).

    Its first block may be ragged; for odd counts its second one repeats the first and does not count.
    """
    k_smem, v_smem, full, empty = kv_ring
    SCORES: gl.constexpr = _accumulator(BLOCK, _depth(QK))
    RANGE: gl.constexpr = _log2_range(QK)
    at0, at1 = _first_pair_at(listed, count)
    f0, e0 = _factors(at0, scales, exponents, q_scale, QK)
    f1, e1 = _factors(at1, scales, exponents, q_scale, QK)
    t0, t1 = _start_scores(q, k_smem, wait_full(full, step), QK)
    s0, s1 = _finish_scores(t0, t1, 0, QK)
    key = gl.arange(0, BLOCK, gl.SliceLayout(0, SCORES))
    valid0 = (gl.load(at0) * BLOCK + key < k_tokens)[None, :]
    valid1 = count % 2 == 0
    x0 = gl.where(valid0, s0.to(gl.float32), NO_SCORE)
    x1 = gl.where(valid1, s1.to(gl.float32), NO_SCORE)
    row_max = gl.maximum(gl.max(x0, 1) * f0 + e0, gl.max(x1, 1) * f1 + e1)
    p0 = gl.where(valid0, gl.exp2(x0 * _column(f0, SCORES) - _column(row_max - e0 - RANGE, SCORES)), 0.0)
    p1 = gl.where(valid1, gl.exp2(x1 * _column(f1, SCORES) - _column(row_max - e1 - RANGE, SCORES)), 0.0)
    row_sum = _lane_sums(p0) * gl.exp2(-e0) + _lane_sums(p1) * gl.exp2(-e1)
    return p0, p1, row_max, row_sum


@gluon.jit
def _next_pair(at, q, q_scale, scales, exponents, state, kv_ring, step, dtype: gl.constexpr, QK: gl.constexpr):
    """One step of the loop: scores and exponentials of this pair while P V of the pair before is under way."""
    acc, p0, p1, row_max, row_sum = state
    k_smem, v_smem, full, empty = kv_ring
    SCORES: gl.constexpr = _accumulator(BLOCK, _depth(QK))
    RANGE: gl.constexpr = _log2_range(QK)
    LANES: gl.constexpr = _lanes()
    stage = wait_full(full, step)
    t0, t1 = _start_scores(q, k_smem, stage, QK)
    # P is converted here, while the scores are under way: carried over as FP8, its bytes would be taken apart
    acc_t, a0, a1 = _start_pair_output(p0, p1, v_smem, stage_of(full, step - 1), acc, dtype, QK)
    f0, e0 = _factors(at, scales, exponents, q_scale, QK)
    f1, e1 = _factors(at + 1, scales, exponents, q_scale, QK)
    x0, x1 = _finish_scores(t0, t1, 2, QK)
    m0 = _lane_maxima(x0) * _column(f0, LANES) + e0
    m1 = _lane_maxima(x1) * _column(f1, LANES) + e1
    new_max = gl.convert_layout(gl.max(gl.maximum(m0, m1), 1), gl.SliceLayout(1, SCORES))
    new_max = gl.where(new_max > row_max + ROOM, new_max, row_max)
    correction = gl.exp2(row_max - new_max)
    p0 = gl.exp2(x0.to(gl.float32) * _column(f0, SCORES) - _column(new_max - e0 - RANGE, SCORES))
    p1 = gl.exp2(x1.to(gl.float32) * _column(f1, SCORES) - _column(new_max - e1 - RANGE, SCORES))
    fresh = _lane_sums(p0) * gl.exp2(-e0) + _lane_sums(p1) * gl.exp2(-e1)
    row_sum = row_sum * _column(correction, LANES) + fresh
    # naming P here keeps its exponentials before the wait, beside P V of the pair before
    acc, p0, p1 = warpgroup_mma_wait(0, [acc_t, p0, p1])
    _keep_pair(a0, a1, QK)
    leave(empty, step - 1)
    return _rescaled(acc, correction), p0, p1, new_max, row_sum


@gluon.jit
def _phi(q_at, z_at, layout: gl.constexpr):
    """phi(Q) of 64 rows without its denominator, which cancels: (bfloat16 (64, D), phi(Q) Z_i (64,))."""
    wide = q_at.load(layout).to(gl.float32)
    largest = gl.max(wide, 1)
    exponentials = gl.exp2(wide * LOG2_E - (largest * LOG2_E)[:, None])
    z = gl.load(z_at + gl.arange(0, D, gl.SliceLayout(0, layout))).to(gl.float32)
    return exponentials.to(gl.bfloat16), gl.sum(exponentials * z[None, :], 1)


@gluon.jit
def _finish_alone(acc_t, a0, a1, row_sum, kv_ring, step, QK: gl.constexpr):
    """The output and the ratio where there is no linear branch, once the last P V is done."""
    k_smem, v_smem, full, empty = kv_ring
    acc = warpgroup_mma_wait(0, [acc_t])
    _keep_pair(a0, a1, QK)
    leave(empty, step - 1)
    ROW: gl.constexpr = gl.SliceLayout(1, _accumulator(D, _depth(QK)))
    return acc / row_sum[:, None], gl.full([HALF], 1.0, gl.float32, ROW)


@gluon.jit
def _finish_mixed(acc_t, a0, a1, row_sum, ratio, phi, norm, kv_ring, step, QK: gl.constexpr):
    """The output mixed with phi(Q) H_i, which is taken beside the last P V, and the ratio, 1 where phi(Q) Z_i vanishes."""
    k_smem, v_smem, full, empty = kv_ring
    OUTPUT: gl.constexpr = _accumulator(D, _depth(QK))
    LINEAR: gl.constexpr = _accumulator(D, 16)
    norm = gl.convert_layout(norm, gl.SliceLayout(1, OUTPUT))
    # H_i lies in two halves of 64 rows, so phi(Q) is multiplied in two halves of 64 columns
    upper, lower = phi.reshape([HALF, 2, BLOCK]).permute([0, 2, 1]).split()
    upper = gl.convert_layout(upper, gl.DotOperandLayout(0, LINEAR, 2))
    lower = gl.convert_layout(lower, gl.DotOperandLayout(0, LINEAR, 2))
    stage = wait_full(full, step)
    h0 = _half_of_sums(k_smem, stage, QK).reshape([BLOCK, D])
    h1 = _half_of_sums(v_smem, stage, QK).reshape([BLOCK, D])
    linear_t = warpgroup_mma(upper, h0, gl.zeros([HALF, D], gl.float32, LINEAR), use_acc=False, is_async=True)
    linear_t = warpgroup_mma(lower, h1, linear_t, is_async=True)
    acc, o_linear = warpgroup_mma_wait(0, [acc_t, linear_t])
    _keep_pair(a0, a1, QK)
    keep(upper, 16)
    keep(lower, 16)
    leave(empty, step - 1)
    leave(empty, step)
    weightless = norm < MIN_LINEAR_WEIGHT
    ratio = gl.where(weightless, 1.0, ratio)
    share = gl.where(weightless, 0.0, (1.0 - ratio) / norm)
    return acc * (ratio / row_sum)[:, None] + gl.convert_layout(o_linear, OUTPUT) * share[:, None], ratio


@gluon.jit
def _store_output(acc, out_plane, stride_n, stride_d, first_row, tokens, QK: gl.constexpr):
    """Writes 64 rows (64, D)."""
    STORE: gl.constexpr = _stored(QK)
    acc = acc.to(out_plane.dtype.element_ty)
    if QK == "int8":
        # V's channels came in register order
        acc = acc.reshape([HALF, D // 32, 4, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([HALF, D])
        acc = gl.convert_layout(acc, STORE)
    rows = first_row + gl.arange(0, HALF, gl.SliceLayout(1, STORE))
    d = gl.arange(0, D, gl.SliceLayout(0, STORE))
    out_at = out_plane + rows[:, None] * stride_n + d[None, :] * stride_d
    gl.store(out_at, acc, mask=(rows < tokens)[:, None])


@gluon.jit
def _consume(
    PART: gl.constexpr, q_ring, kv_ring, inputs, outputs, sizes, QUERY_BLOCK: gl.constexpr, QK: gl.constexpr,
    RATIO_KIND: gl.constexpr,
):  # fmt: skip
    """One warpgroup: 64 rows, the PART-th, of every tile of this program."""
    q_smem, q_full, q_empty = q_ring
    k_smem, v_smem, full, empty = kv_ring
    selected, k_scale, v_exponent, balance, sums, block_ratio = inputs
    ratio_of_rows, out, out_stride_b, out_stride_h, out_stride_n, out_stride_d = outputs
    heads, first_head, q_tokens, k_tokens, q_blocks, k_blocks, count, tiles, scale_log2 = sizes
    OUTPUT: gl.constexpr = _accumulator(D, _depth(QK))
    ROW: gl.constexpr = gl.SliceLayout(1, OUTPUT)
    PHI: gl.constexpr = gl.DotOperandLayout(0, _accumulator(D, 16), 2)
    dtype: gl.constexpr = q_smem.dtype
    CONSUMERS: gl.constexpr = q_smem.shape[0] // q_full.shape[0]
    turn = 0
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        slot, q_block, half = _place_of(tile, q_blocks, CONSUMERS, QUERY_BLOCK)
        bh = (first_head + slot).to(gl.int64)
        listed = selected + (bh * q_blocks + q_block) * count
        scales = k_scale + slot * k_blocks
        exponents = v_exponent + slot * k_blocks

        place = wait_full(q_full, turn)
        queries = q_smem.index(CONSUMERS * place + PART).reshape([HALF, D])
        q, q_scale = _queries(queries, balance + bh * (2 * D) + D, scale_log2, QK)
        p0, p1, row_max, row_sum = _first_pair(
            listed, q, q_scale, scales, exponents, kv_ring, step, count, k_tokens, QK
        )
        acc = gl.zeros([HALF, D], gl.float32, OUTPUT)
        step += 1
        for s in range(1, (count + 1) // 2):
            at = listed + 2 * s - 1 - count % 2
            state = (acc, p0, p1, row_max, row_sum)
            acc, p0, p1, row_max, row_sum = _next_pair(
                at, q, q_scale, scales, exponents, state, kv_ring, step, dtype, QK
            )
            step += 1
        acc_t, a0, a1 = _start_pair_output(p0, p1, v_smem, stage_of(full, step - 1), acc, dtype, QK)

        row_sum = gl.convert_layout(gl.sum(row_sum, 1), ROW)
        first_row = (half + PART).to(gl.int64) * HALF
        rows = first_row + gl.arange(0, HALF, ROW)
        inside = rows < q_tokens
        ratio_at = ratio_of_rows + bh * q_tokens + rows
        if RATIO_KIND == "none":
            leave(q_empty, turn)
            acc, ratio = _finish_alone(acc_t, a0, a1, row_sum, kv_ring, step, QK)
        else:
            if RATIO_KIND == "estimated":
                mass = gl.convert_layout(row_max, ROW) + gl.log2(row_sum) - _log2_range(QK)
                ratio = 1.0 / (1.0 + gl.exp2(gl.load(ratio_at, mask=inside, other=0.0) - mass))
            else:
                ratio = gl.zeros([HALF], gl.float32, ROW)
                ratio = ratio + gl.load(block_ratio + bh * q_blocks + q_block)
            phi, norm = _phi(queries, sums + (slot * q_blocks + q_block).to(gl.int64) * ((D + 1) * D) + D * D, PHI)
            leave(q_empty, turn)
            acc, ratio = _finish_mixed(acc_t, a0, a1, row_sum, ratio, phi, norm, kv_ring, step, QK)
            step += 1
        turn += 1

        gl.store(ratio_at, ratio, mask=inside)
        out_plane = out + bh // heads * out_stride_b + bh % heads * out_stride_h
        _store_output(acc, out_plane, out_stride_n, out_stride_d, first_row, q_tokens, QK)


@gluon.jit(do_not_specialize=["heads", "first_head", "q_tokens", "k_tokens", "q_blocks", "k_blocks", "count", "tiles"])
def _hopper_sparse_attention(
    q_desc, k_desc, v_desc, h_desc, selected, k_scale, v_exponent, balance, sums, block_ratio, ratio, out,
    out_stride_b, out_stride_h, out_stride_n, out_stride_d,
    heads, first_head, q_tokens, k_tokens, q_blocks, k_blocks, count, tiles, scale_log2,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr, QUERY_BLOCK: gl.constexpr, QK: gl.constexpr,
    RATIO_KIND: gl.constexpr,
):  # fmt: skip
    V_ROWS: gl.constexpr = D if QK == "int8" else BLOCK
    V_COLUMNS: gl.constexpr = BLOCK if QK == "int8" else D
    LINEAR: gl.constexpr = RATIO_KIND != "none"
    UPPER: gl.constexpr = 0
    LOWER: gl.constexpr = 1
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS * Q_STAGES, 1, 1, HALF, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [2 * STAGES, 1, 1, BLOCK, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [2 * STAGES, 1, 1, V_ROWS, V_COLUMNS], v_desc.layout)
    q_full = new_barriers(Q_STAGES, 1)
    q_empty = new_barriers(Q_STAGES, CONSUMERS)
    full = new_barriers(STAGES, 1)
    empty = new_barriers(STAGES, CONSUMERS)
    fence_async_shared()
    # constants survive only in tuples written in the call itself
    if CONSUMERS == 1:
        gl.warp_specialize([
            (_consume, (
                UPPER, (q_smem, q_full, q_empty), (k_smem, v_smem, full, empty),
                (selected, k_scale, v_exponent, balance, sums, block_ratio),
                (ratio, out, out_stride_b, out_stride_h, out_stride_n, out_stride_d),
                (heads, first_head, q_tokens, k_tokens, q_blocks, k_blocks, count, tiles, scale_log2), QUERY_BLOCK, QK, RATIO_KIND,
            )),
            (_produce, (
                (q_desc, k_desc, v_desc, h_desc), (q_smem, q_full, q_empty), (k_smem, v_smem, full, empty), selected,
                (heads, first_head, q_blocks, count, tiles), QUERY_BLOCK, QK, LINEAR,
            )),
        ], [1], [24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (
                UPPER, (q_smem, q_full, q_empty), (k_smem, v_smem, full, empty),
                (selected, k_scale, v_exponent, balance, sums, block_ratio),
                (ratio, out, out_stride_b, out_stride_h, out_stride_n, out_stride_d),
                (heads, first_head, q_tokens, k_tokens, q_blocks, k_blocks, count, tiles, scale_log2), QUERY_BLOCK, QK, RATIO_KIND,
            )),
            (_consume, (
                LOWER, (q_smem, q_full, q_empty), (k_smem, v_smem, full, empty),
                (selected, k_scale, v_exponent, balance, sums, block_ratio),
                (ratio, out, out_stride_b, out_stride_h, out_stride_n, out_stride_d),
                (heads, first_head, q_tokens, k_tokens, q_blocks, k_blocks, count, tiles, scale_log2), QUERY_BLOCK, QK, RATIO_KIND,
            )),
            (_produce, (
                (q_desc, k_desc, v_desc, h_desc), (q_smem, q_full, q_empty), (k_smem, v_smem, full, empty), selected,
                (heads, first_head, q_blocks, count, tiles), QUERY_BLOCK, QK, LINEAR,
            )),
        ], [4, 1], [240, 24])  # fmt: skip


def _descriptor(tensor, rows, columns):
    """TMA descriptor of a (B, H, N, C) tensor, any 16-byte strides, in tiles of rows x columns."""
    bits = 8 * tensor.element_size()
    layout = gl.NVMMASharedLayout(min(128, columns * bits // 8), bits, rank=4)
    return TensorDescriptor.from_tensor(tensor, [1, 1, rows, columns], layout)


def _descriptors(q, k, v, work):
    """Of Q, K, V and H_i; q stands in for an H_i that no block needs."""
    k_blocks = block_count(k.shape[2], K_BLOCK)
    sums = q
    if work.query_sums is not None:
        sums = work.query_sums[:, :, : HEAD_DIM * HEAD_DIM].view(1, -1, HEAD_DIM, HEAD_DIM)
    if work.packed_k is None:
        pair = _descriptor(k, K_BLOCK, HEAD_DIM), _descriptor(v, K_BLOCK, HEAD_DIM)
    else:
        k_tiles = work.packed_k.view(1, -1, k_blocks * K_BLOCK, HEAD_DIM)
        v_tiles = work.packed_v.view(1, -1, k_blocks * HEAD_DIM, K_BLOCK)
        pair = _descriptor(k_tiles, K_BLOCK, HEAD_DIM), _descriptor(v_tiles, HEAD_DIM, K_BLOCK)
    return _descriptor(q, HALF.value, HEAD_DIM), *pair, _descriptor(sums, K_BLOCK, HEAD_DIM)


def hopper_sparse_attention(
    q, k, v, out, work, balance, selected, block_ratio, ratio, group, *, query_block, ratio_kind, scale_log2, qk
):
    """As sparse_attention() of sparse_attention.py, for the calls that takes_hopper_loop() names, but out is only written.

    work.packed_v and, in 8 bit, work.query_sums: in register order. block_ratio: (B * H, T_m), or None where it is not
    "learned".
    """
    heads, q_tokens = q.shape[1:3]
    q_blocks, count = selected.shape[1:]
    k_blocks = block_count(k.shape[2], K_BLOCK)
    program = PROGRAMS[qk]
    tiles = (group.stop - group.start) * q_blocks * (query_block // (program.consumers * HALF.value))
    # warp_specialize() passes no None on, so a tensor that a call has no use for is replaced by any float32 one
    k_scale, v_exponent, balance = (work.k_scale, work.v_exponent, balance) if qk == "int8" else (ratio, ratio, ratio)
    sums = ratio if ratio_kind == "none" else work.query_sums
    block_ratio = ratio if block_ratio is None else block_ratio
    launch(
        _hopper_sparse_attention, (min(tiles, program.resident * programs(q.device)),),
        *_descriptors(q, k, v, work), selected, k_scale, v_exponent, balance, sums, block_ratio, ratio, out,
        *out.stride(), heads, group.start, q_tokens, k.shape[2], q_blocks, k_blocks, count, tiles, scale_log2,
        CONSUMERS=program.consumers, STAGES=program.stages, Q_STAGES=program.q_stages, QUERY_BLOCK=query_block, QK=qk,
        RATIO_KIND=ratio_kind, options=program.options,
    )  # fmt: skip
