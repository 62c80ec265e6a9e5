"""The sparse loop and the linear branch for Hopper (sm_90) in Gluon: a producer warp and two consumer warpgroups, persistent.

The producer brings Q tiles and pairs of selected key blocks by TMA through a ring of STAGES; each consumer holds half a
query block (64 rows) and, within a step, has the scores of this pair and P V of the pair before under way while it takes
exponentials. H_i comes last through the same ring, and phi(Q_i) H_i is taken beside the last P V. The arithmetic is that of
kernels/sparse_attention.py and kernels/linear_attention.py, but for Q's scale, which is one per row.

P V's left operand stays in the registers that the scores came in: pack(register_order=True) puts V's keys in the order in
which those registers are an FP8 operand, and V's channels, with them H_i's columns, in the one that gives each thread eight
neighbours of the output.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..router import LEAST_LINEAR_WEIGHT, block_count
from .base2 import LOG2_E
from .hopper_gluon import keep, load_async, programs, reinterpret
from .int8 import INT8_BIAS
from .launch import launch

P_LOG2_RANGE = gl.constexpr(8.0)
LEAST_WEIGHT = gl.constexpr(LEAST_LINEAR_WEIGHT)
LOWEST = gl.constexpr(-1.0e30)
NONE, LEARNED, ESTIMATED = 0, 1, 2
RATIOS = {"none": NONE, "learned": LEARNED, "estimated": ESTIMATED}
RATIO_NONE, RATIO_ESTIMATED = gl.constexpr(NONE), gl.constexpr(ESTIMATED)
# pairs of key blocks and Q tiles in flight: as many as fit the shared memory
STAGES = {"int8": 5, "16bit": 3}
Q_STAGES = {"int8": 2, "16bit": 1}


@gluon.jit
def _first_block(list_start, count):
    """Places of step 0's pair: the list's last block, which alone may be ragged, and for even counts its first."""
    return list_start + count - 1, list_start + gl.where(count % 2 == 0, 0, count - 1)


@gluon.jit
def _half_of_sums(smem, stage, BLOCK: gl.constexpr, D: gl.constexpr, LOW: gl.constexpr):
    """Room for 64 rows of H_i, bfloat16 (64, D), where a stage of ``smem`` has tiles of its pair: two in 8 bit, one in 16."""
    TILES: gl.constexpr = smem.shape[0] // (2 if LOW else 1)
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=4)
    tiles = reinterpret(smem, gl.bfloat16, [TILES, 1, 1, BLOCK, D], LAYOUT)
    return tiles.index(stage if LOW else 2 * stage)


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, h_desc, q_smem, k_smem, v_smem, q_full, q_empty, full, empty, selected,
    heads, first_head, q_blocks, count, tiles,
    D: gl.constexpr, BLOCK: gl.constexpr, HALF: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
    LOW: gl.constexpr, LINEAR: gl.constexpr,
):  # fmt: skip
    """One warp: fills a stage of q_smem per tile, one of k_smem and v_smem per step, and one more with H_i."""
    Q_BYTES: gl.constexpr = 2 * HALF * D * q_desc.dtype.primitive_bitwidth // 8
    PAIR_BYTES: gl.constexpr = 4 * BLOCK * D * k_desc.dtype.primitive_bitwidth // 8
    SUMS_BYTES: gl.constexpr = D * D * 2
    V_ROWS: gl.constexpr = D if LOW else BLOCK
    steps = (count + 1) // 2
    turn = 0
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        slot = tile // q_blocks
        q_block = tile % q_blocks
        bh = first_head + slot
        place = turn % Q_STAGES
        mbarrier.wait(q_empty.index(place), ((turn // Q_STAGES) & 1) ^ 1)
        q_bar = q_full.index(place)
        mbarrier.expect(q_bar, Q_BYTES)
        for half in gl.static_range(2):
            at = [bh // heads, bh % heads, (2 * q_block + half) * HALF, 0]
            load_async(q_desc, at, q_bar, q_smem.index(2 * place + half))
        turn += 1
        row = selected + (bh.to(gl.int64) * q_blocks + q_block) * count
        at0, at1 = _first_block(row, count)
        if LOW:
            batch = 0
            head = slot
        else:
            batch = bh // heads
            head = bh % heads
        for s in range(steps):
            stage = step % STAGES
            j0 = gl.load(at0)
            j1 = gl.load(at1)
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
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
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            bar = full.index(stage)
            mbarrier.expect(bar, SUMS_BYTES)
            upper = _half_of_sums(k_smem, stage, BLOCK, D, LOW)
            lower = _half_of_sums(v_smem, stage, BLOCK, D, LOW)
            load_async(h_desc, [0, tile, 0, 0], bar, upper)
            load_async(h_desc, [0, tile, BLOCK, 0], bar, lower)
            step += 1


@gluon.jit
def _quantized_queries(q_at, layout: gl.constexpr):
    """Half a query block as INT8, the left operand of Q K^T, and its scale per row."""
    wide = q_at.load(layout).to(gl.float32)
    largest = gl.maximum(gl.max(gl.abs(wide), 1), 1e-20)
    # the float32 with a last bit worth 1 rounds, and its last byte is the INT8
    biased = wide * (127.0 / largest)[:, None] + INT8_BIAS
    return biased.to(gl.int32, bitcast=True).to(gl.int8), largest / 127.0


@gluon.jit
def _start_scores(q_at, k_smem, stage, PAIR: gl.constexpr, SCORES: gl.constexpr, D: gl.constexpr, LOW: gl.constexpr):
    """Q K^T of a pair of key blocks, under way. LOW: both at once on INT8."""
    ROWS: gl.constexpr = q_at.shape[0]
    BLOCK: gl.constexpr = SCORES.instr_shape[1]
    if LOW:
        pairs = reinterpret(k_smem, gl.int8, [k_smem.shape[0] // 2, 2 * BLOCK, D], gl.NVMMASharedLayout(128, 8))
        k = pairs.index(stage).permute([1, 0])
        zeros = gl.zeros([ROWS, 2 * BLOCK], gl.int32, PAIR)
        t0 = warpgroup_mma(q_at, k, zeros, use_acc=False, is_async=True)
        t1 = t0
    else:
        k0 = k_smem.index(2 * stage).reshape([BLOCK, D]).permute([1, 0])
        k1 = k_smem.index(2 * stage + 1).reshape([BLOCK, D]).permute([1, 0])
        zeros = gl.zeros([ROWS, BLOCK], gl.float32, SCORES)
        t0 = warpgroup_mma(q_at, k0, zeros, use_acc=False, is_async=True)
        t1 = warpgroup_mma(q_at, k1, zeros, use_acc=False, is_async=True)
    return t0, t1


@gluon.jit
def _finish_scores(t0, t1, pending: gl.constexpr, SCORES: gl.constexpr, LOW: gl.constexpr):
    """The two blocks' scores of _start_scores(), once at most ``pending`` later products are under way."""
    if LOW:
        t = warpgroup_mma_wait(pending, [t0])
        s0, s1 = t.reshape([t.shape[0], 2, t.shape[1] // 2]).permute([0, 2, 1]).split()
        s0 = gl.convert_layout(s0, SCORES)
        s1 = gl.convert_layout(s1, SCORES)
    else:
        s0, s1 = warpgroup_mma_wait(pending, [t0, t1])
    return s0.to(gl.float32), s1.to(gl.float32)


@gluon.jit
def _to_operand(p, dtype: gl.constexpr, layout: gl.constexpr, LOW: gl.constexpr):
    """P as the left operand of P V, without moving anything between threads."""
    if LOW:
        ROWS: gl.constexpr = p.shape[0]
        KEYS: gl.constexpr = p.shape[1]
        p = p.reshape([ROWS, KEYS // 16, 2, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([ROWS, KEYS])
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
            "=r,f,f,f,f", [gl.convert_layout(p, layout)], dtype=gl.int8, is_pure=True, pack=4,
        )  # fmt: skip
        operand = packed.to(gl.float8e4nv, bitcast=True)
    else:
        operand = gl.convert_layout(p.to(dtype), layout)
    return operand


@gluon.jit
def _start_output(operand, v_smem, place, acc, D: gl.constexpr, LOW: gl.constexpr):
    """acc + P V of one key block, under way."""
    BLOCK: gl.constexpr = operand.shape[1]
    if LOW:
        v = v_smem.index(place).reshape([D, BLOCK]).permute([1, 0])
    else:
        v = v_smem.index(place).reshape([BLOCK, D])
    return warpgroup_mma(operand, v, acc, is_async=True)


@gluon.jit
def _lane_sums(p, layout: gl.constexpr):
    """Sums of each row's columns that lie in the same thread, (64, 4): the four threads of a row meet only at the end."""
    p = p.reshape([p.shape[0], p.shape[1] // 8, 4, 2])
    return gl.convert_layout(gl.sum(gl.sum(p, 3), 1), layout)


@gluon.jit
def _lane_maxima(x, layout: gl.constexpr):
    """As _lane_sums, the largest."""
    x = x.reshape([x.shape[0], x.shape[1] // 8, 4, 2])
    return gl.convert_layout(gl.max(gl.max(x, 3), 1), layout)


@gluon.jit
def _column(x, layout: gl.constexpr):
    """A row's value for all its columns in ``layout``; a number stays one."""
    if x.type.is_block():
        return gl.convert_layout(x, gl.SliceLayout(1, layout))[:, None]
    else:
        return x


@gluon.jit
def _phi(q_at, z_at, layout: gl.constexpr, D: gl.constexpr):
    """phi(Q) of half a query block without its denominator, which cancels: (bfloat16 (64, D), phi(Q) Z_i (64,))."""
    wide = q_at.load(layout).to(gl.float32)
    largest = gl.max(wide, 1)
    exponentials = gl.exp2(wide * LOG2_E - (largest * LOG2_E)[:, None])
    z = gl.load(z_at + gl.arange(0, D, gl.SliceLayout(0, layout))).to(gl.float32)
    return exponentials.to(gl.bfloat16), gl.sum(exponentials * z[None, :], 1)


@gluon.jit
def _factors(at, scales, exponents, q_scale, LOW: gl.constexpr):
    """(score factor, V's exponent) of the key block whose number lies at ``at``."""
    if LOW:
        j = gl.load(at)
        factor = q_scale * gl.load(scales + j)
        exponent = gl.load(exponents + j)
    else:
        factor = q_scale
        exponent = 0.0
    return factor, exponent


@gluon.jit
def _consume(
    PART: gl.constexpr, q_smem, k_smem, v_smem, q_full, q_empty, full, empty,
    selected, k_scale, v_exponent, sums, ratios, row_ratio, out,
    out_stride_b, out_stride_h, out_stride_n, out_stride_d,
    heads, first_head, q_tokens, k_tokens, q_blocks, k_blocks, count, tiles, scale_log2,
    D: gl.constexpr, BLOCK: gl.constexpr, HALF: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
    LOW: gl.constexpr, RATIO: gl.constexpr,
):  # fmt: skip
    """One warpgroup: rows PART * 64 to PART * 64 + 63 of every query block of this program."""
    DEPTH: gl.constexpr = 32 if LOW else 16  # of a matrix instruction
    PAIR: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * BLOCK, DEPTH])
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, DEPTH])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, DEPTH])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 4 if LOW else 2)
    LINEAR: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LANES: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[8, 0]], lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], warp_bases=[[16, 0], [32, 0]],
        block_bases=[], shape=[64, 4],
    )  # fmt: skip
    # the accumulator's registers, once its columns have been put in order
    STORE: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 32], [0, 64], [8, 0]], lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]], block_bases=[], shape=[64, 128],
    ) if LOW else OUTPUT  # fmt: skip
    RANGE: gl.constexpr = P_LOG2_RANGE if LOW else gl.constexpr(0.0)
    steps = (count + 1) // 2
    pairs = count % 2 == 0
    key = gl.arange(0, BLOCK, gl.SliceLayout(0, SCORES))
    turn = 0
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        slot = tile // q_blocks
        q_block = tile % q_blocks
        bh = (first_head + slot).to(gl.int64)
        head = bh % heads
        row = selected + (bh * q_blocks + q_block) * count
        scales = k_scale + slot * k_blocks
        exponents = v_exponent + slot * k_blocks

        place = turn % Q_STAGES
        mbarrier.wait(q_full.index(place), (turn // Q_STAGES) & 1)
        queries = q_smem.index(2 * place + PART).reshape([HALF, D])
        if LOW:
            q_at, q_scale = _quantized_queries(queries, gl.DotOperandLayout(0, PAIR, 4))
            q_scale = scale_log2 * gl.convert_layout(q_scale, gl.SliceLayout(1, SCORES))
        else:
            q_at = queries
            q_scale = scale_log2
        turn += 1

        at0, at1 = _first_block(row, count)
        f0, e0 = _factors(at0, scales, exponents, q_scale, LOW)
        f1, e1 = _factors(at1, scales, exponents, q_scale, LOW)
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        t0, t1 = _start_scores(q_at, k_smem, stage, PAIR, SCORES, D, LOW)
        s0, s1 = _finish_scores(t0, t1, 0, SCORES, LOW)
        live0 = (gl.load(at0) * BLOCK + key < k_tokens)[None, :]
        x0 = gl.where(live0, s0, LOWEST)
        x1 = gl.where(pairs, s1, LOWEST)
        row_max = gl.maximum(gl.max(x0, 1) * f0 + e0, gl.max(x1, 1) * f1 + e1)
        p0 = gl.where(live0, gl.exp2(x0 * _column(f0, SCORES) - _column(row_max - e0 - RANGE, SCORES)), 0.0)
        p1 = gl.where(pairs, gl.exp2(x1 * _column(f1, SCORES) - _column(row_max - e1 - RANGE, SCORES)), 0.0)
        row_sum = _lane_sums(p0, LANES) * gl.exp2(-e0) + _lane_sums(p1, LANES) * gl.exp2(-e1)
        acc = gl.zeros([HALF, D], gl.float32, OUTPUT)
        step += 1

        for s in range(1, steps):
            stage = step % STAGES
            before = (step - 1) % STAGES
            at0 = row + 2 * s - 1 - count % 2
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            t0, t1 = _start_scores(q_at, k_smem, stage, PAIR, SCORES, D, LOW)
            # converted here, while the scores are under way: carried over as FP8, the bytes would be taken apart
            a0 = _to_operand(p0, q_smem.dtype, OPERAND, LOW)
            a1 = _to_operand(p1, q_smem.dtype, OPERAND, LOW)
            acc_t = _start_output(a0, v_smem, 2 * before, acc, D, LOW)
            acc_t = _start_output(a1, v_smem, 2 * before + 1, acc_t, D, LOW)
            f0, e0 = _factors(at0, scales, exponents, q_scale, LOW)
            f1, e1 = _factors(at0 + 1, scales, exponents, q_scale, LOW)
            x0, x1 = _finish_scores(t0, t1, 2, SCORES, LOW)
            m0 = _lane_maxima(x0, LANES) * _column(f0, LANES) + e0
            m1 = _lane_maxima(x1, LANES) * _column(f1, LANES) + e1
            new_max = gl.convert_layout(gl.max(gl.maximum(m0, m1), 1), gl.SliceLayout(1, SCORES))
            new_max = gl.maximum(new_max, row_max)
            correction = gl.exp2(row_max - new_max)
            p0 = gl.exp2(x0 * _column(f0, SCORES) - _column(new_max - e0 - RANGE, SCORES))
            p1 = gl.exp2(x1 * _column(f1, SCORES) - _column(new_max - e1 - RANGE, SCORES))
            fresh = _lane_sums(p0, LANES) * gl.exp2(-e0) + _lane_sums(p1, LANES) * gl.exp2(-e1)
            row_sum = row_sum * _column(correction, LANES) + fresh
            row_max = new_max
            # naming P here keeps its exponentials before the wait, beside P V of the pair before
            acc, p0, p1 = warpgroup_mma_wait(0, [acc_t, p0, p1])
            keep(a0, LOW)
            keep(a1, LOW)
            mbarrier.arrive(empty.index(before), count=1)
            acc = acc * gl.convert_layout(correction, gl.SliceLayout(1, OUTPUT))[:, None]
            step += 1

        before = (step - 1) % STAGES
        a0 = _to_operand(p0, q_smem.dtype, OPERAND, LOW)
        a1 = _to_operand(p1, q_smem.dtype, OPERAND, LOW)
        acc_t = _start_output(a0, v_smem, 2 * before, acc, D, LOW)
        acc_t = _start_output(a1, v_smem, 2 * before + 1, acc_t, D, LOW)

        row_sum = gl.convert_layout(gl.sum(row_sum, 1), gl.SliceLayout(1, OUTPUT))
        rows = (2 * q_block + PART).to(gl.int64) * HALF + gl.arange(0, HALF, gl.SliceLayout(1, OUTPUT))
        inside = rows < q_tokens
        ratio_at = row_ratio + bh * q_tokens + rows
        if RATIO == RATIO_NONE:
            mbarrier.arrive(q_empty.index(place), count=1)
            ratio = gl.full([HALF], 1.0, gl.float32, gl.SliceLayout(1, OUTPUT))
            acc = warpgroup_mma_wait(0, [acc_t])
            keep(a0, LOW)
            keep(a1, LOW)
            mbarrier.arrive(empty.index(before), count=1)
            acc = acc / row_sum[:, None]
        else:
            if RATIO == RATIO_ESTIMATED:
                mass = gl.convert_layout(row_max, gl.SliceLayout(1, OUTPUT)) + gl.log2(row_sum) - RANGE
                ratio = 1.0 / (1.0 + gl.exp2(gl.load(ratio_at, mask=inside, other=0.0) - mass))
            else:
                ratio = gl.zeros([HALF], gl.float32, gl.SliceLayout(1, OUTPUT))
                ratio = ratio + gl.load(ratios + bh * q_blocks + q_block)
            phi, norm = _phi(
                queries, sums + tile.to(gl.int64) * ((D + 1) * D) + D * D, gl.DotOperandLayout(0, LINEAR, 2), D
            )
            mbarrier.arrive(q_empty.index(place), count=1)
            norm = gl.convert_layout(norm, gl.SliceLayout(1, OUTPUT))
            upper, lower = phi.reshape([HALF, 2, BLOCK]).permute([0, 2, 1]).split()
            upper = gl.convert_layout(upper, gl.DotOperandLayout(0, LINEAR, 2))
            lower = gl.convert_layout(lower, gl.DotOperandLayout(0, LINEAR, 2))
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            h0 = _half_of_sums(k_smem, stage, BLOCK, D, LOW).reshape([BLOCK, D])
            h1 = _half_of_sums(v_smem, stage, BLOCK, D, LOW).reshape([BLOCK, D])
            linear_t = warpgroup_mma(upper, h0, gl.zeros([HALF, D], gl.float32, LINEAR), use_acc=False, is_async=True)
            linear_t = warpgroup_mma(lower, h1, linear_t, is_async=True)
            acc, o_linear = warpgroup_mma_wait(0, [acc_t, linear_t])
            keep(a0, LOW)
            keep(a1, LOW)
            keep(upper, False)
            keep(lower, False)
            mbarrier.arrive(empty.index(before), count=1)
            mbarrier.arrive(empty.index(stage), count=1)
            step += 1
            weightless = norm < LEAST_WEIGHT
            ratio = gl.where(weightless, 1.0, ratio)
            share = gl.where(weightless, 0.0, (1.0 - ratio) / norm)
            acc = acc * (ratio / row_sum)[:, None] + gl.convert_layout(o_linear, OUTPUT) * share[:, None]

        gl.store(ratio_at, ratio, mask=inside)
        acc = acc.to(out.dtype.element_ty)
        if LOW:
            acc = acc.reshape([HALF, D // 32, 4, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([HALF, D])
            acc = gl.convert_layout(acc, STORE)
        rows = (2 * q_block + PART).to(gl.int64) * HALF + gl.arange(0, HALF, gl.SliceLayout(1, STORE))
        d = gl.arange(0, D, gl.SliceLayout(0, STORE))
        out_at = out + bh // heads * out_stride_b + head * out_stride_h
        out_at = out_at + rows[:, None] * out_stride_n + d[None, :] * out_stride_d
        gl.store(out_at, acc, mask=(rows < q_tokens)[:, None])


@gluon.jit(do_not_specialize=["heads", "first_head", "q_tokens", "k_tokens", "q_blocks", "k_blocks", "count", "tiles"])
def _hopper_sparse_attention(
    q_desc, k_desc, v_desc, h_desc, selected, k_scale, v_exponent, sums, ratios, row_ratio, out,
    out_stride_b, out_stride_h, out_stride_n, out_stride_d,
    heads, first_head, q_tokens, k_tokens, q_blocks, k_blocks, count, tiles, scale_log2,
    D: gl.constexpr, BLOCK: gl.constexpr, HALF: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
    LOW: gl.constexpr, RATIO: gl.constexpr,
):  # fmt: skip
    V_ROWS: gl.constexpr = D if LOW else BLOCK
    V_COLUMNS: gl.constexpr = BLOCK if LOW else D
    LINEAR: gl.constexpr = RATIO != RATIO_NONE
    UPPER: gl.constexpr = 0
    LOWER: gl.constexpr = 1
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [2 * Q_STAGES, 1, 1, HALF, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [2 * STAGES, 1, 1, BLOCK, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [2 * STAGES, 1, 1, V_ROWS, V_COLUMNS], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(Q_STAGES):
        mbarrier.init(q_full.index(place), count=1)
        mbarrier.init(q_empty.index(place), count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    # constants survive only in tuples written in the call itself
    gl.warp_specialize([
        (_consume, (
            UPPER, q_smem, k_smem, v_smem, q_full, q_empty, full, empty,
            selected, k_scale, v_exponent, sums, ratios, row_ratio, out,
            out_stride_b, out_stride_h, out_stride_n, out_stride_d,
            heads, first_head, q_tokens, k_tokens, q_blocks, k_blocks, count, tiles, scale_log2,
            D, BLOCK, HALF, STAGES, Q_STAGES, LOW, RATIO,
        )),
        (_consume, (
            LOWER, q_smem, k_smem, v_smem, q_full, q_empty, full, empty,
            selected, k_scale, v_exponent, sums, ratios, row_ratio, out,
            out_stride_b, out_stride_h, out_stride_n, out_stride_d,
            heads, first_head, q_tokens, k_tokens, q_blocks, k_blocks, count, tiles, scale_log2,
            D, BLOCK, HALF, STAGES, Q_STAGES, LOW, RATIO,
        )),
        (_produce, (
            q_desc, k_desc, v_desc, h_desc, q_smem, k_smem, v_smem, q_full, q_empty, full, empty, selected,
            heads, first_head, q_blocks, count, tiles, D, BLOCK, HALF, STAGES, Q_STAGES, LOW, LINEAR,
        )),
    ], [4, 1], [240, 24])  # fmt: skip


def _descriptor(tensor, rows, columns):
    """TMA descriptor of a (B, H, N, C) tensor, any 16-byte strides, in tiles of rows x columns."""
    bits = 8 * tensor.element_size()
    layout = gl.NVMMASharedLayout(min(128, columns * bits // 8), bits, rank=4)
    return TensorDescriptor.from_tensor(tensor, [1, 1, rows, columns], layout)


def _descriptors(q, k, v, work, q_block, block):
    """Of Q, K, V and H_i; q stands in for an H_i that no block needs."""
    k_blocks, head_dim = block_count(k.shape[2], block), q.shape[3]
    sums = (
        q if work.query_sums is None else work.query_sums[:, :, : head_dim * head_dim].view(1, -1, head_dim, head_dim)
    )
    if work.k_low is None:
        pair = _descriptor(k, block, head_dim), _descriptor(v, block, head_dim)
    else:
        k_tiles = work.k_low.view(1, -1, k_blocks * block, head_dim)
        v_tiles = work.v_low.view(1, -1, k_blocks * head_dim, block)
        pair = _descriptor(k_tiles, block, head_dim), _descriptor(v_tiles, head_dim, block)
    return _descriptor(q, q_block // 2, head_dim), *pair, _descriptor(sums, block, head_dim)


def hopper_sparse_attention(
    q, k, v, out, work, selected, ratios, row_ratio, heads_slice, *, ratio, scale_log2, qk, q_block, block,
    plan=None,
):  # fmt: skip
    """As kernels.sparse_attention.sparse_attention, for the calls that takes_hopper_loop() names, but out is only written.

    work.v_low and, in 8 bit, work.query_sums: in register order.
    """
    heads, q_tokens, head_dim = q.shape[1:]
    low = qk != "16bit"
    q_blocks, count = selected.shape[1:]
    k_blocks, slots = block_count(k.shape[2], block), heads_slice.stop - heads_slice.start
    # what a mode does not read is any tensor of its kind: partitions take no None
    k_scale, v_exponent = (work.k_scale, work.v_exponent) if low else (row_ratio, row_ratio)
    sums = row_ratio if ratio == "none" else work.query_sums
    ratios = row_ratio if ratios is None else ratios
    tiles = slots * q_blocks
    launch(
        plan, _hopper_sparse_attention, (min(tiles, programs(q.device)),),
        *_descriptors(q, k, v, work, q_block, block), selected, k_scale, v_exponent, sums, ratios, row_ratio, out,
        *out.stride(), heads, heads_slice.start, q_tokens, k.shape[2], q_blocks, k_blocks, count, tiles, scale_log2,
        D=head_dim, BLOCK=block, HALF=q_block // 2, STAGES=STAGES[qk], Q_STAGES=Q_STAGES[qk],
        LOW=low, RATIO=RATIOS[ratio], options={"num_warps": 4},
    )  # fmt: skip
