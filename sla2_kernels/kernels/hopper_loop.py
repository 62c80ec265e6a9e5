"""The sparse loop for Hopper (sm_90) in Gluon: a producer warp and two consumer warpgroups, persistent.

The producer brings Q tiles and pairs of selected key blocks by TMA through a ring of STAGES; each consumer holds half a
query block (64 rows) and, within a step, has the scores of this pair and P V of the pair before under way while it takes
exponentials. The arithmetic is kernels/sparse_attention.py's, but for Q's scale, which is one per half.

P V's left operand stays in the registers that the scores came in: pack(register_order=True) puts V's keys in the order in
which those registers are an FP8 operand, and V's channels in the one that gives each thread eight neighbours of the output.
"""

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..router import block_count
from .launch import launch

INT8_BIAS_BITS = gl.constexpr(0x4B400000)
INT8_BIAS = gl.constexpr(12582912.0)
P_LOG2_RANGE = gl.constexpr(8.0)
LOWEST = gl.constexpr(-1.0e30)
NONE, LEARNED, ESTIMATED = 0, 1, 2
RATIOS = {"none": NONE, "learned": LEARNED, "estimated": ESTIMATED}
RATIO_NONE, RATIO_ESTIMATED = gl.constexpr(NONE), gl.constexpr(ESTIMATED)
STAGES = {"int8": 4, "16bit": 3}  # pairs of key blocks in flight: as many as fit the shared memory
# renamed between Triton 3.6 and 3.9
load_async = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def _first_block(list_start, count):
    """Places of step 0's pair: the list's last block, which alone may be ragged, and for even counts its first."""
    return list_start + count - 1, list_start + gl.where(count % 2 == 0, 0, count - 1)


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_full, q_empty, full, empty, selected,
    heads, first_head, q_blocks, count, tiles,
    D: gl.constexpr, BLOCK: gl.constexpr, HALF: gl.constexpr, STAGES: gl.constexpr, LOW: gl.constexpr,
):  # fmt: skip
    """One warp: fills q_smem once per tile and a stage of k_smem and v_smem once per step."""
    Q_BYTES: gl.constexpr = 2 * HALF * D * q_desc.dtype.primitive_bitwidth // 8
    PAIR_BYTES: gl.constexpr = 4 * BLOCK * D * k_desc.dtype.primitive_bitwidth // 8
    V_ROWS: gl.constexpr = D if LOW else BLOCK
    steps = (count + 1) // 2
    turn = 0
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        slot = tile // q_blocks
        q_block = tile % q_blocks
        bh = first_head + slot
        mbarrier.wait(q_empty, (turn & 1) ^ 1)
        mbarrier.expect(q_full, Q_BYTES)
        for half in gl.static_range(2):
            load_async(q_desc, [bh // heads, bh % heads, (2 * q_block + half) * HALF, 0], q_full, q_smem.index(half))
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


@gluon.jit
def _quantize_queries(q_at, q8_at, HALF: gl.constexpr, D: gl.constexpr):
    """Writes half a query block as INT8 to q8_at; its scale."""
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    wide = q_at.load(LOAD).to(gl.float32)
    largest = gl.maximum(gl.max(gl.max(gl.abs(wide), 1), 0), 1e-20)
    scaled = wide * (127.0 / largest)
    q8_at.store(gl.where(scaled >= 0, scaled + 0.5, scaled - 0.5).to(gl.int8))
    fence_async_shared()
    return largest / 127.0


@gluon.jit
def _start_scores(q_at, k_smem, place, S: gl.constexpr, D: gl.constexpr, LOW: gl.constexpr):
    """Q K^T of one key block, under way. LOW: on INT8, with the bias that makes the bits a float32."""
    ROWS: gl.constexpr = q_at.shape[0]
    BLOCK: gl.constexpr = S.instr_shape[1]
    k = k_smem.index(place).reshape([BLOCK, D]).permute([1, 0])
    if LOW:
        scores = warpgroup_mma(q_at, k, gl.full([ROWS, BLOCK], INT8_BIAS_BITS, gl.int32, S), is_async=True)
    else:
        scores = warpgroup_mma(q_at, k, gl.zeros([ROWS, BLOCK], gl.float32, S), use_acc=False, is_async=True)
    return scores


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
def _keep(operand, LOW: gl.constexpr):
    """Holds the registers that a matrix instruction under way reads until here: after the wait for it."""
    if LOW:
        gl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [operand.to(gl.int8, bitcast=True)], dtype=gl.int8, is_pure=False, pack=4
        )
    else:
        gl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [operand.to(gl.int16, bitcast=True)], dtype=gl.int16, is_pure=False, pack=2
        )


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
    PART: gl.constexpr, q_smem, q8_smem, k_smem, v_smem, q_full, q_empty, full, empty,
    selected, k_scale, v_exponent, ratios, row_ratio, out,
    out_stride_b, out_stride_h, out_stride_n, out_stride_d,
    heads, first_head, q_tokens, k_tokens, q_blocks, k_blocks, count, tiles, scale_log2,
    D: gl.constexpr, BLOCK: gl.constexpr, HALF: gl.constexpr, STAGES: gl.constexpr, LOW: gl.constexpr,
    RATIO: gl.constexpr,
):  # fmt: skip
    """One warpgroup: rows PART * 64 to PART * 64 + 63 of every query block of this program."""
    DEPTH: gl.constexpr = 32 if LOW else 16  # of a matrix instruction
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, DEPTH])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, DEPTH])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 4 if LOW else 2)
    # the accumulator's registers, once its columns have been put in order
    STORE: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 32], [0, 64], [8, 0]], lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]], block_bases=[], shape=[64, 128],
    ) if LOW else OUTPUT  # fmt: skip
    BIAS: gl.constexpr = INT8_BIAS if LOW else gl.constexpr(0.0)
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

        mbarrier.wait(q_full, turn & 1)
        if LOW:
            q_at = q8_smem.index(PART)
            q_scale = scale_log2 * _quantize_queries(q_smem.index(PART).reshape([HALF, D]), q_at, HALF, D)
            # the 16-bit tile is read: the next one may come
            mbarrier.arrive(q_empty, count=1)
        else:
            q_at = q_smem.index(PART).reshape([HALF, D])
            q_scale = scale_log2
        turn += 1

        at0, at1 = _first_block(row, count)
        f0, e0 = _factors(at0, scales, exponents, q_scale, LOW)
        f1, e1 = _factors(at1, scales, exponents, q_scale, LOW)
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        t0 = _start_scores(q_at, k_smem, 2 * stage, SCORES, D, LOW)
        t1 = _start_scores(q_at, k_smem, 2 * stage + 1, SCORES, D, LOW)
        s0, s1 = warpgroup_mma_wait(0, [t0, t1])
        live0 = (gl.load(at0) * BLOCK + key < k_tokens)[None, :]
        x0 = gl.where(live0, s0.to(gl.float32, bitcast=True), LOWEST)
        x1 = gl.where(pairs, s1.to(gl.float32, bitcast=True), LOWEST)
        row_max = gl.maximum((gl.max(x0, 1) - BIAS) * f0 + e0, (gl.max(x1, 1) - BIAS) * f1 + e1)
        p0 = gl.where(live0, gl.exp2(x0 * f0 - (BIAS * f0 + row_max - e0 - RANGE)[:, None]), 0.0)
        p1 = gl.where(pairs, gl.exp2(x1 * f1 - (BIAS * f1 + row_max - e1 - RANGE)[:, None]), 0.0)
        row_sum = gl.sum(p0, 1) * gl.exp2(-e0) + gl.sum(p1, 1) * gl.exp2(-e1)
        acc = gl.zeros([HALF, D], gl.float32, OUTPUT)
        step += 1

        for s in range(1, steps):
            stage = step % STAGES
            before = (step - 1) % STAGES
            at0 = row + 2 * s - 1 - count % 2
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            t0 = _start_scores(q_at, k_smem, 2 * stage, SCORES, D, LOW)
            t1 = _start_scores(q_at, k_smem, 2 * stage + 1, SCORES, D, LOW)
            # converted here, while the scores are under way: carried over as FP8, the bytes would be taken apart
            a0 = _to_operand(p0, q_smem.dtype, OPERAND, LOW)
            a1 = _to_operand(p1, q_smem.dtype, OPERAND, LOW)
            acc_t = _start_output(a0, v_smem, 2 * before, acc, D, LOW)
            acc_t = _start_output(a1, v_smem, 2 * before + 1, acc_t, D, LOW)
            f0, e0 = _factors(at0, scales, exponents, q_scale, LOW)
            f1, e1 = _factors(at0 + 1, scales, exponents, q_scale, LOW)
            s0, s1 = warpgroup_mma_wait(2, [t0, t1])
            x0 = s0.to(gl.float32, bitcast=True)
            x1 = s1.to(gl.float32, bitcast=True)
            new_max = gl.maximum((gl.max(x0, 1) - BIAS) * f0 + e0, (gl.max(x1, 1) - BIAS) * f1 + e1)
            new_max = gl.maximum(new_max, row_max)
            p0 = gl.exp2(x0 * f0 - (BIAS * f0 + new_max - e0 - RANGE)[:, None])
            p1 = gl.exp2(x1 * f1 - (BIAS * f1 + new_max - e1 - RANGE)[:, None])
            correction = gl.exp2(row_max - new_max)
            row_sum = row_sum * correction + gl.sum(p0, 1) * gl.exp2(-e0) + gl.sum(p1, 1) * gl.exp2(-e1)
            row_max = new_max
            # naming P here keeps its exponentials before the wait, beside P V of the pair before
            acc, p0, p1 = warpgroup_mma_wait(0, [acc_t, p0, p1])
            _keep(a0, LOW)
            _keep(a1, LOW)
            mbarrier.arrive(empty.index(before), count=1)
            acc = acc * gl.convert_layout(correction, gl.SliceLayout(1, OUTPUT))[:, None]
            step += 1

        if not LOW:
            mbarrier.arrive(q_empty, count=1)
        before = (step - 1) % STAGES
        a0 = _to_operand(p0, q_smem.dtype, OPERAND, LOW)
        a1 = _to_operand(p1, q_smem.dtype, OPERAND, LOW)
        acc_t = _start_output(a0, v_smem, 2 * before, acc, D, LOW)
        acc_t = _start_output(a1, v_smem, 2 * before + 1, acc_t, D, LOW)
        acc = warpgroup_mma_wait(0, [acc_t])
        _keep(a0, LOW)
        _keep(a1, LOW)
        mbarrier.arrive(empty.index(before), count=1)

        if LOW:
            acc = acc.reshape([HALF, D // 32, 4, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([HALF, D])
            acc = gl.convert_layout(acc, STORE)
        sums = gl.convert_layout(row_sum, gl.SliceLayout(1, STORE))
        rows = (2 * q_block + PART).to(gl.int64) * HALF + gl.arange(0, HALF, gl.SliceLayout(1, STORE))
        d = gl.arange(0, D, gl.SliceLayout(0, STORE))
        inside = rows < q_tokens
        out_at = out + bh // heads * out_stride_b + head * out_stride_h
        out_at = out_at + rows[:, None] * out_stride_n + d[None, :] * out_stride_d
        ratio_at = row_ratio + bh * q_tokens + rows
        if RATIO == RATIO_NONE:
            ratio = gl.full([HALF], 1.0, gl.float32, gl.SliceLayout(1, STORE))
            acc = acc / sums[:, None]
        else:
            if RATIO == RATIO_ESTIMATED:
                mass = gl.convert_layout(row_max, gl.SliceLayout(1, STORE)) + gl.log2(sums) - RANGE
                ratio = 1.0 / (1.0 + gl.exp2(gl.load(ratio_at, mask=inside, other=0.0) - mass))
            else:
                ratio = gl.zeros([HALF], gl.float32, gl.SliceLayout(1, STORE))
                ratio = ratio + gl.load(ratios + head * q_blocks + q_block)
            o_linear = gl.load(out_at, mask=inside[:, None], other=0.0).to(gl.float32)
            acc = acc * (ratio / sums)[:, None] + o_linear * (1.0 - ratio)[:, None]
        gl.store(out_at, acc.to(out.dtype.element_ty), mask=inside[:, None])
        gl.store(ratio_at, ratio, mask=inside)


@gluon.jit(do_not_specialize=["heads", "first_head", "q_tokens", "k_tokens", "q_blocks", "k_blocks", "count", "tiles"])
def _hopper_sparse_attention(
    q_desc, k_desc, v_desc, selected, k_scale, v_exponent, ratios, row_ratio, out,
    out_stride_b, out_stride_h, out_stride_n, out_stride_d,
    heads, first_head, q_tokens, k_tokens, q_blocks, k_blocks, count, tiles, scale_log2,
    D: gl.constexpr, BLOCK: gl.constexpr, HALF: gl.constexpr, STAGES: gl.constexpr, LOW: gl.constexpr,
    RATIO: gl.constexpr,
):  # fmt: skip
    V_ROWS: gl.constexpr = D if LOW else BLOCK
    V_COLUMNS: gl.constexpr = BLOCK if LOW else D
    UPPER: gl.constexpr = 0
    LOWER: gl.constexpr = 1
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [2, 1, 1, HALF, D], q_desc.layout)
    q8_smem = gl.allocate_shared_memory(
        gl.int8, [2 if LOW else 1, HALF, D if LOW else 16], gl.NVMMASharedLayout(128 if LOW else 0, 8)
    )
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [2 * STAGES, 1, 1, BLOCK, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [2 * STAGES, 1, 1, V_ROWS, V_COLUMNS], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    # constants survive only in tuples written in the call itself
    gl.warp_specialize([
        (_consume, (
            UPPER, q_smem, q8_smem, k_smem, v_smem, q_full, q_empty, full, empty,
            selected, k_scale, v_exponent, ratios, row_ratio, out,
            out_stride_b, out_stride_h, out_stride_n, out_stride_d,
            heads, first_head, q_tokens, k_tokens, q_blocks, k_blocks, count, tiles, scale_log2,
            D, BLOCK, HALF, STAGES, LOW, RATIO,
        )),
        (_consume, (
            LOWER, q_smem, q8_smem, k_smem, v_smem, q_full, q_empty, full, empty,
            selected, k_scale, v_exponent, ratios, row_ratio, out,
            out_stride_b, out_stride_h, out_stride_n, out_stride_d,
            heads, first_head, q_tokens, k_tokens, q_blocks, k_blocks, count, tiles, scale_log2,
            D, BLOCK, HALF, STAGES, LOW, RATIO,
        )),
        (_produce, (
            q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_full, q_empty, full, empty, selected,
            heads, first_head, q_blocks, count, tiles, D, BLOCK, HALF, STAGES, LOW,
        )),
    ], [4, 1], [240, 24])  # fmt: skip


def _descriptor(tensor, rows, columns):
    """TMA descriptor of a (B, H, N, C) tensor, any 16-byte strides, in tiles of rows x columns."""
    bits = 8 * tensor.element_size()
    layout = gl.NVMMASharedLayout(min(128, columns * bits // 8), bits, rank=4)
    return TensorDescriptor.from_tensor(tensor, [1, 1, rows, columns], layout)


@functools.cache
def _programs(device):
    """One per multiprocessor; 1 for tensors that are on no card, whose launch is only compiled."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def hopper_sparse_attention(
    q, k, v, out, work, selected, ratios, row_ratio, heads_slice, *, ratio, scale_log2, qk, q_block, block,
    plan=None,
):  # fmt: skip
    """As kernels.sparse_attention.sparse_attention, for the calls that takes_hopper_loop() names.

    work.v_low: packed in register order.
    """
    heads, q_tokens, head_dim = q.shape[1:]
    low = qk != "16bit"
    q_blocks, count = selected.shape[1:]
    k_blocks, slots = block_count(k.shape[2], block), heads_slice.stop - heads_slice.start
    if low:
        k_tiles = work.k_low.view(1, -1, k_blocks * block, head_dim)
        v_tiles = work.v_low.view(1, -1, k_blocks * head_dim, block)
        descriptors = _descriptor(k_tiles, block, head_dim), _descriptor(v_tiles, head_dim, block)
    else:
        descriptors = _descriptor(k, block, head_dim), _descriptor(v, block, head_dim)
    # what a mode does not read is any tensor of its kind: partitions take no None
    k_scale, v_exponent = (work.k_scale, work.v_exponent) if low else (row_ratio, row_ratio)
    ratios = row_ratio if ratios is None else ratios
    tiles = slots * q_blocks
    launch(
        plan, _hopper_sparse_attention, (min(tiles, _programs(q.device)),),
        _descriptor(q, q_block // 2, head_dim), *descriptors, selected, k_scale, v_exponent, ratios, row_ratio, out,
        *out.stride(), heads, heads_slice.start, q_tokens, k.shape[2], q_blocks, k_blocks, count, tiles, scale_log2,
        D=head_dim, BLOCK=block, HALF=q_block // 2, STAGES=STAGES[qk], LOW=low, RATIO=RATIOS[ratio], options={"num_warps": 4},
    )  # fmt: skip
