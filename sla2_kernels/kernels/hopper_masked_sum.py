"""The masked sum of kernels/masked_sum.py for Hopper (sm_90) in Gluon, on FP8 matrix instructions: H_i of one head.

FP8 matrix instructions want both operands along the sum, that is along the key blocks j, but h_j arrives feature by
feature. So the product is taken transposed, H^T = h^T W^T, and h^T comes from registers, where four bytes of four key
blocks change places. A producer warp brings tiles of h and of the weights W by TMA, two consumer warpgroups of 128
features multiply them. W is the 0/1 mask times each block's power of two (kernels/weighted_mask.py).
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..router import block_count
from .hopper_gluon import keep, load_async, programs
from .launch import launch

FEATURES, ROWS, STEP = 128, 128, 64
STAGES = 7


@gluon.jit
def _produce(
    h_desc, w_desc, h_smem, w_smem, full, empty, blocks, tiles_m, tiles_f, tiles,
    FEATURES: gl.constexpr, ROWS: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp: fills a stage with the h of two feature tiles and the weights of one row tile, STEP key blocks."""
    BYTES: gl.constexpr = STEP * (2 * FEATURES + ROWS)
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        slot = tile // (tiles_m * tiles_f)
        m = tile % tiles_m
        f = tile // tiles_m % tiles_f
        for start in range(0, blocks, STEP):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            bar = full.index(stage)
            mbarrier.expect(bar, BYTES)
            load_async(h_desc, [slot, start, 2 * f * FEATURES], bar, h_smem.index(2 * stage))
            load_async(h_desc, [slot, start, (2 * f + 1) * FEATURES], bar, h_smem.index(2 * stage + 1))
            load_async(w_desc, [slot, m * ROWS, start], bar, w_smem.index(stage))
            step += 1


@gluon.jit
def _along_key_blocks(h, layout: gl.constexpr):
    """E4M3 bits of h (STEP, FEATURES) as the left operand (FEATURES, STEP), without moving anything between threads.

    Its rows are the features in the order of bits 1, 6 5, 0, 4 3 2 of their numbers, its columns the key blocks in the
    order of bits 5 4, 2 1, 3, 0: that of the weights.
    """
    h = h.reshape([4, 2, 4, 2, 32, 4]).permute([0, 2, 4, 5, 1, 3])
    even, odd = h.split()
    h0, h2 = even.split()
    h1, h3 = odd.split()
    y0, y1, y2, y3 = gl.inline_asm_elementwise(
        """
        {
        .reg .b32 t0, t1, u0, u1;
        prmt.b32 t0, $4, $5, 0x5140;
        prmt.b32 t1, $4, $5, 0x7362;
        prmt.b32 u0, $6, $7, 0x5140;
        prmt.b32 u1, $6, $7, 0x7362;
        prmt.b32 $0, t0, u0, 0x5410;
        prmt.b32 $1, t0, u0, 0x7632;
        prmt.b32 $2, t1, u1, 0x5410;
        prmt.b32 $3, t1, u1, 0x7632;
        }
        """,
        "=r,=r,=r,=r,r,r,r,r", [h0, h1, h2, h3], dtype=[gl.int8] * 4, is_pure=True, pack=4,
    )  # fmt: skip
    y = gl.join(gl.join(y0, y2), gl.join(y1, y3))  # (5 4, 2 1, feature 6..2, word, feature 1, feature 0)
    y = y.reshape([4, 4, 4, 8, 4, 2, 2]).permute([5, 2, 6, 3, 0, 1, 4]).reshape([128, 64])
    return gl.convert_layout(y, layout).to(gl.float8e4nv, bitcast=True)


@gluon.jit
def _operand(
    h_smem, full, step, PART: gl.constexpr, load_layout: gl.constexpr, layout: gl.constexpr, STAGES: gl.constexpr
):
    """The left operand of a step, once it has come."""
    stage = step % STAGES
    mbarrier.wait(full.index(stage), (step // STAGES) & 1)
    h = h_smem.index(2 * stage + PART)
    return _along_key_blocks(h.reshape([h.shape[1], h.shape[2]]).load(load_layout), layout)


@gluon.jit
def _weights(w_smem, step, STAGES: gl.constexpr):
    """The right operand of a step."""
    w = w_smem.index(step % STAGES)
    return w.reshape([w.shape[1], w.shape[2]]).permute([1, 0])


@gluon.jit
def _consume(
    PART: gl.constexpr, h_smem, w_smem, full, empty, scale, out, out_stride_g, out_stride_m,
    rows, blocks, tiles_m, tiles_f, tiles,
    FEATURES: gl.constexpr, ROWS: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup: features (2 f + PART) * 128 to + 127 of every tile of this program."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 32])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 4)
    # lanes 0 1: key block bits 1 2, so that the four rows that a warp reads lie in different banks
    LOAD: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [1, 0], [8, 0], [16, 0], [32, 0]],
        lane_bases=[[2, 0], [4, 0], [0, 4], [0, 8], [0, 16]], warp_bases=[[0, 32], [0, 64]], block_bases=[], shape=[64, 128],
    )  # fmt: skip
    # (row, feature) as the accumulators lie, four neighbouring features a thread
    STORE: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [1, 0], [8, 0], [16, 0], [32, 0], [64, 0]],
        lane_bases=[[2, 0], [4, 0], [0, 4], [0, 8], [0, 16]], warp_bases=[[0, 32], [0, 64]], block_bases=[], shape=[128, 128],
    )  # fmt: skip
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        slot = tile // (tiles_m * tiles_f)
        m = tile % tiles_m
        f = tile // tiles_m % tiles_f
        acc = gl.zeros([FEATURES, ROWS], gl.float32, SUMS)
        # nothing is under way from one turn to the next: the compiler would wait after every matrix instruction, for want
        # of registers. Two stages a turn, and the other warpgroup multiplies meanwhile.
        pairs = blocks // (2 * STEP)
        for _ in range(pairs):
            h0 = _operand(h_smem, full, step, PART, LOAD, OPERAND, STAGES)
            h1 = _operand(h_smem, full, step + 1, PART, LOAD, OPERAND, STAGES)
            acc_t = warpgroup_mma(h0, _weights(w_smem, step, STAGES), acc, is_async=True)
            acc_t = warpgroup_mma(h1, _weights(w_smem, step + 1, STAGES), acc_t, is_async=True)
            acc = warpgroup_mma_wait(0, [acc_t])
            keep(h0, True)
            keep(h1, True)
            mbarrier.arrive(empty.index(step % STAGES), count=1)
            mbarrier.arrive(empty.index((step + 1) % STAGES), count=1)
            step += 2
        for _ in range(2 * pairs * STEP, blocks, STEP):
            h0 = _operand(h_smem, full, step, PART, LOAD, OPERAND, STAGES)
            acc_t = warpgroup_mma(h0, _weights(w_smem, step, STAGES), acc, is_async=True)
            acc = warpgroup_mma_wait(0, [acc_t])
            keep(h0, True)
            mbarrier.arrive(empty.index(step % STAGES), count=1)
            step += 1
        acc = (acc * gl.load(scale + slot)).to(out.dtype.element_ty)
        acc = acc.reshape([2, 4, 2, 8, ROWS]).permute([4, 1, 3, 0, 2]).reshape([ROWS, FEATURES])
        acc = gl.convert_layout(acc, STORE)
        i = m * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, STORE))
        d = (2 * f + PART) * FEATURES + gl.arange(0, FEATURES, gl.SliceLayout(0, STORE))
        out_at = out + slot.to(gl.int64) * out_stride_g + i.to(gl.int64)[:, None] * out_stride_m + d[None, :]
        gl.store(out_at, acc, mask=(i < rows)[:, None])


@gluon.jit(do_not_specialize=["rows", "blocks", "tiles_m", "tiles_f", "tiles"])
def _hopper_masked_sum(
    h_desc, w_desc, scale, out, out_stride_g, out_stride_m, rows, blocks, tiles_m, tiles_f, tiles,
    FEATURES: gl.constexpr, ROWS: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    UPPER: gl.constexpr = 0
    LOWER: gl.constexpr = 1
    h_smem = gl.allocate_shared_memory(gl.int8, [2 * STAGES, 1, STEP, FEATURES], h_desc.layout)
    w_smem = gl.allocate_shared_memory(w_desc.dtype, [STAGES, 1, ROWS, STEP], w_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    # constants survive only in tuples written in the call itself
    gl.warp_specialize([
        (_consume, (
            UPPER, h_smem, w_smem, full, empty, scale, out, out_stride_g, out_stride_m,
            rows, blocks, tiles_m, tiles_f, tiles, FEATURES, ROWS, STEP, STAGES,
        )),
        (_consume, (
            LOWER, h_smem, w_smem, full, empty, scale, out, out_stride_g, out_stride_m,
            rows, blocks, tiles_m, tiles_f, tiles, FEATURES, ROWS, STEP, STAGES,
        )),
        (_produce, (
            h_desc, w_desc, h_smem, w_smem, full, empty, blocks, tiles_m, tiles_f, tiles,
            FEATURES, ROWS, STEP, STAGES,
        )),
    ], [4, 1], [240, 24])  # fmt: skip


def hopper_masked_sum(work, heads_slice, plan=None):
    """H_i of work.query_sums for the heads of ``heads_slice``: weights_scale[g] * weights[g] @ sums[g], of ``work``."""
    blocks, columns = work.sums.shape[1:]
    rows = work.query_sums.shape[1]
    tiles_m, tiles_f = block_count(rows, ROWS), columns // (2 * FEATURES)
    tiles = (heads_slice.stop - heads_slice.start) * tiles_m * tiles_f
    h_desc = TensorDescriptor.from_tensor(
        work.sums.view(torch.int8), [1, STEP, FEATURES], gl.NVMMASharedLayout(128, 8, rank=3)
    )
    w_desc = TensorDescriptor.from_tensor(work.weights, [1, ROWS, STEP], gl.NVMMASharedLayout(64, 8, rank=3))
    launch(
        plan, _hopper_masked_sum, (min(tiles, programs(work.sums.device)),), h_desc, w_desc,
        work.weights_scale, work.query_sums, *work.query_sums.stride()[:2], rows, blocks, tiles_m, tiles_f, tiles,
        FEATURES=FEATURES, ROWS=ROWS, STEP=STEP, STAGES=STAGES, options={"num_warps": 4},
    )  # fmt: skip
