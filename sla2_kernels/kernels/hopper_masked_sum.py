"""The masked sum of kernels/masked_sum.py for Hopper (sm_90) in Gluon, on FP8 matrix instructions: H_i of one head.

FP8 matrix instructions want both operands along the sum, that is along the key blocks j, but h_j is stored feature by
feature. So the product is transposed, H^T = h^T W^T, and h^T comes from registers, where four bytes of four key blocks
change places. A producer warp brings tiles of h and of the weights W by TMA; two consumer warpgroups of 128 features
each multiply them. W is the 0/1 mask times each block's power of two (kernels/weighted_mask.py).
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
from .along_key_blocks import along_key_blocks, layout_of_h, layout_of_sums
from .gluon_shared import keep, leave, load_async, new_barriers, programs, stage_of, wait_empty, wait_full
from .launch import launch

STAGES = 7  # tiles of h and W in flight: as many as the shared memory holds
FEATURES = gl.constexpr(128)  # of a consumer
ROWS = gl.constexpr(128)  # query blocks of a tile
STEP = gl.constexpr(64)  # key blocks of a stage


@gluon.jit
def _tile_of(tile, tiles_m, tiles_f):
    """(head, row tile, pair of feature tiles): row tiles run fastest, so that neighbours share h in L2."""
    return tile // (tiles_m * tiles_f), tile % tiles_m, tile // tiles_m % tiles_f


@gluon.jit
def _produce(h_desc, w_desc, ring, blocks, tiles_m, tiles_f, tiles):
    """One warp: fills a stage with the h of two feature tiles and the weights of one row tile, STEP key blocks."""
    h_smem, w_smem, full, empty = ring
    BYTES: gl.constexpr = STEP * (2 * FEATURES + ROWS)
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        slot, m, f = _tile_of(tile, tiles_m, tiles_f)
        for start in range(0, blocks, STEP):
            stage = wait_empty(empty, step)
            bar = full.index(stage)
            mbarrier.expect(bar, BYTES)
            load_async(h_desc, [slot, start, 2 * f * FEATURES], bar, h_smem.index(2 * stage))
            load_async(h_desc, [slot, start, (2 * f + 1) * FEATURES], bar, h_smem.index(2 * stage + 1))
            load_async(w_desc, [slot, m * ROWS, start], bar, w_smem.index(stage))
            step += 1


@gluon.jit
def _operand(h_smem, full, step, PART: gl.constexpr, load_layout: gl.constexpr, layout: gl.constexpr):
    """The left operand of a step, once it has come."""
    h = h_smem.index(2 * wait_full(full, step) + PART)
    h = along_key_blocks(h.reshape([h.shape[1], h.shape[2]]).load(load_layout))
    return gl.convert_layout(h, layout).to(gl.float8e4nv, bitcast=True)


@gluon.jit
def _weights(w_smem, full, step):
    """The right operand of a step."""
    w = w_smem.index(stage_of(full, step))
    return w.reshape([w.shape[1], w.shape[2]]).permute([1, 0])


@gluon.jit
def _consume(PART: gl.constexpr, ring, scale, out, out_stride_g, out_stride_m, rows, blocks, tiles_m, tiles_f, tiles):
    """One warpgroup: features (2 f + PART) * 128 to + 127 of every tile of this program."""
    h_smem, w_smem, full, empty = ring
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 32])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 4)
    LOAD: gl.constexpr = layout_of_h()
    STORE: gl.constexpr = layout_of_sums()
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        slot, m, f = _tile_of(tile, tiles_m, tiles_f)
        acc = gl.zeros([FEATURES, ROWS], gl.float32, SUMS)
        # no product is under way from one turn to the next: short of registers, the compiler would then wait after every
        # matrix instruction. Two stages a turn, and meanwhile the other warpgroup multiplies.
        pairs = blocks // (2 * STEP)
        for _ in range(pairs):
            h0 = _operand(h_smem, full, step, PART, LOAD, OPERAND)
            h1 = _operand(h_smem, full, step + 1, PART, LOAD, OPERAND)
            acc_t = warpgroup_mma(h0, _weights(w_smem, full, step), acc, is_async=True)
            acc_t = warpgroup_mma(h1, _weights(w_smem, full, step + 1), acc_t, is_async=True)
            acc = warpgroup_mma_wait(0, [acc_t])
            keep(h0, 8)
            keep(h1, 8)
            leave(empty, step)
            leave(empty, step + 1)
            step += 2
        for _ in range(2 * pairs * STEP, blocks, STEP):
            h0 = _operand(h_smem, full, step, PART, LOAD, OPERAND)
            acc_t = warpgroup_mma(h0, _weights(w_smem, full, step), acc, is_async=True)
            acc = warpgroup_mma_wait(0, [acc_t])
            keep(h0, 8)
            leave(empty, step)
            step += 1
        acc = (acc * gl.load(scale + slot)).to(out.dtype.element_ty)  # [FEATURES, ROWS], the features as in the operand
        acc = acc.reshape([2, 4, 2, 8, ROWS]).permute([4, 1, 3, 0, 2]).reshape([ROWS, FEATURES])
        acc = gl.convert_layout(acc, STORE)
        i = m * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, STORE))
        d = (2 * f + PART) * FEATURES + gl.arange(0, FEATURES, gl.SliceLayout(0, STORE))
        out_at = out + slot.to(gl.int64) * out_stride_g + i.to(gl.int64)[:, None] * out_stride_m + d[None, :]
        gl.store(out_at, acc, mask=(i < rows)[:, None])


@gluon.jit(do_not_specialize=["rows", "blocks", "tiles_m", "tiles_f", "tiles"])
def _hopper_masked_sum(
    h_desc, w_desc, scale, out, out_stride_g, out_stride_m, rows, blocks, tiles_m, tiles_f, tiles, STAGES: gl.constexpr
):
    UPPER: gl.constexpr = 0
    LOWER: gl.constexpr = 1
    h_smem = gl.allocate_shared_memory(gl.int8, [2 * STAGES, 1, STEP, FEATURES], h_desc.layout)
    w_smem = gl.allocate_shared_memory(w_desc.dtype, [STAGES, 1, ROWS, STEP], w_desc.layout)
    full = new_barriers(STAGES, 1)
    empty = new_barriers(STAGES, 2)
    fence_async_shared()
    # constants survive only in tuples written in the call itself
    gl.warp_specialize([
        (_consume, (
            UPPER, (h_smem, w_smem, full, empty), scale, out, out_stride_g, out_stride_m,
            rows, blocks, tiles_m, tiles_f, tiles,
        )),
        (_consume, (
            LOWER, (h_smem, w_smem, full, empty), scale, out, out_stride_g, out_stride_m,
            rows, blocks, tiles_m, tiles_f, tiles,
        )),
        (_produce, (h_desc, w_desc, (h_smem, w_smem, full, empty), blocks, tiles_m, tiles_f, tiles)),
    ], [4, 1], [240, 24])  # fmt: skip


def hopper_masked_sum(work, group):
    """H_i of work.query_sums for the heads of slice ``group``: weights_scale[g] * weights[g] @ sums[g], of ``work``."""
    blocks, columns = work.sums.shape[1:]
    rows, features, step = ROWS.value, FEATURES.value, STEP.value
    query_blocks = work.query_sums.shape[1]
    tiles_m, tiles_f = block_count(query_blocks, rows), columns // (2 * features)
    tiles = (group.stop - group.start) * tiles_m * tiles_f
    h_desc = TensorDescriptor.from_tensor(
        work.sums.view(torch.int8), [1, step, features], gl.NVMMASharedLayout(128, 8, rank=3)
    )
    w_desc = TensorDescriptor.from_tensor(work.weights, [1, rows, step], gl.NVMMASharedLayout(64, 8, rank=3))
    launch(
        _hopper_masked_sum, (min(tiles, programs(work.sums.device)),), h_desc, w_desc, work.weights_scale,
        work.query_sums, *work.query_sums.stride()[:2], query_blocks, blocks, tiles_m, tiles_f, tiles,
        STAGES=STAGES, options={"num_warps": 4},
    )  # fmt: skip
