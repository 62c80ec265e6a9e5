"""The masked sum of masked_sum.py for Hopper (sm_90) in Gluon, in 16 bit: persistent programs of a producer warp and two consumers.

A consumer takes 64 rows of a tile of 128 x 256; the two share the right operand. The results leave by TMA while the next
tile's products are taken.
"""

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
from .hopper_gluon import leave, load_async, new_barriers, programs, store_async, wait_empty, wait_full
from .launch import launch

STAGES = 3  # steps in flight: as many as fit beside the results
ROWS = gl.constexpr(64)  # of a consumer
COLUMNS = gl.constexpr(256)
STEP = gl.constexpr(64)  # terms of the sum


@gluon.jit
def _tile_of(tile, tiles_m, tiles_n):
    """(head, row tile, column tile): row tiles run fastest, so that neighbours share the right operand in L2."""
    return tile // (tiles_m * tiles_n), tile % tiles_m, tile // tiles_m % tiles_n


@gluon.jit
def _produce(mask_desc, sums_desc, ring, first_head, blocks, tiles_m, tiles_n, tiles):
    """One warp: fills a stage with STEP columns of the mask's rows and as many rows of the sums."""
    mask_smem, sums_smem, full, empty = ring
    BYTES: gl.constexpr = 2 * STEP * (2 * ROWS + COLUMNS)
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        slot, m, n = _tile_of(tile, tiles_m, tiles_n)
        for start in range(0, blocks, STEP):
            stage = wait_empty(empty, step)
            bar = full.index(stage)
            mbarrier.expect(bar, BYTES)
            for part in gl.static_range(2):
                at = [first_head + slot, (2 * m + part) * ROWS, start]
                load_async(mask_desc, at, bar, mask_smem.index(2 * stage + part))
            load_async(sums_desc, [slot, start, n * COLUMNS], bar, sums_smem.index(stage))
            step += 1


@gluon.jit
def _consume(PART: gl.constexpr, out_desc, ring, out_smem, blocks, tiles_m, tiles_n, tiles):
    """One warpgroup: the PART-th 64 rows of every tile of this program."""
    mask_smem, sums_smem, full, empty = ring
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    result = out_smem.index(PART)
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        slot, m, n = _tile_of(tile, tiles_m, tiles_n)
        acc = gl.zeros([ROWS, COLUMNS], gl.float32, ACC)
        for _ in range(0, blocks, STEP):
            stage = wait_full(full, step)
            mask = mask_smem.index(2 * stage + PART).reshape([ROWS, STEP])
            acc_t = warpgroup_mma(mask, sums_smem.index(stage).reshape([STEP, COLUMNS]), acc, is_async=True)
            acc = warpgroup_mma_wait(0, [acc_t])
            leave(empty, step)
            step += 1
        tma.store_wait(0)
        result.reshape([ROWS, COLUMNS]).store((acc * (1.0 / blocks)).to(out_desc.dtype))
        fence_async_shared()
        store_async(out_desc, [slot, (2 * m + PART) * ROWS, n * COLUMNS], result)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["first_head", "blocks", "tiles_m", "tiles_n", "tiles"])
def _hopper_product(mask_desc, sums_desc, out_desc, first_head, blocks, tiles_m, tiles_n, tiles, STAGES: gl.constexpr):
    UPPER: gl.constexpr = 0
    LOWER: gl.constexpr = 1
    mask_smem = gl.allocate_shared_memory(mask_desc.dtype, [2 * STAGES, 1, ROWS, STEP], mask_desc.layout)
    sums_smem = gl.allocate_shared_memory(sums_desc.dtype, [STAGES, 1, STEP, COLUMNS], sums_desc.layout)
    out_smem = gl.allocate_shared_memory(out_desc.dtype, [2, 1, ROWS, COLUMNS], out_desc.layout)
    full = new_barriers(STAGES, 1)
    empty = new_barriers(STAGES, 2)
    fence_async_shared()
    # constants survive only in tuples written in the call itself
    gl.warp_specialize([
        (_consume, (
            UPPER, out_desc, (mask_smem, sums_smem, full, empty), out_smem, blocks, tiles_m, tiles_n, tiles,
        )),
        (_consume, (
            LOWER, out_desc, (mask_smem, sums_smem, full, empty), out_smem, blocks, tiles_m, tiles_n, tiles,
        )),
        (_produce, (
            mask_desc, sums_desc, (mask_smem, sums_smem, full, empty), first_head, blocks, tiles_m, tiles_n, tiles,
        )),
    ], [4, 1], [240, 24])  # fmt: skip


def hopper_product(unselected, sums, out, group):
    """As masked_sum() of masked_sum.py, for 16-bit tensors."""
    rows, blocks = unselected.shape[1:]
    layout = gl.NVMMASharedLayout(128, 16, rank=3)
    descriptors = [
        TensorDescriptor.from_tensor(tensor, [1, height, width], layout)
        for tensor, height, width in (
            (unselected, ROWS.value, STEP.value),
            (sums, STEP.value, COLUMNS.value),
            (out, ROWS.value, COLUMNS.value),
        )
    ]
    tiles_m, tiles_n = block_count(rows, 2 * ROWS.value), block_count(out.shape[2], COLUMNS.value)
    tiles = (group.stop - group.start) * tiles_m * tiles_n
    launch(
        _hopper_product, (min(tiles, programs(out.device)),), *descriptors, group.start, blocks, tiles_m, tiles_n, tiles,
        STAGES=STAGES, options={"num_warps": 4},
    )  # fmt: skip
