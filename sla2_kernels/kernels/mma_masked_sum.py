"""The masked sum of kernels/masked_sum.py in INT8 for cards with mma.sync in Gluon: H_i of one head.

INT8 matrix instructions want both operands along the sum, that is along the key blocks j, but h_j is stored feature by
feature. So the product is transposed, H^T = h^T W^T, and h^T comes from registers, where four bytes of four key blocks change
places, as in hopper_masked_sum.py; plain Triton takes 1.2 times as long (2.09 ms for 1.75, benchmarks/NOTES.md). Tiles of h and of
the weights W (kernels/weighted_mask.py) come by cp.async. Bands as in masked_sum.py.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from ..router import block_count
from .along_key_blocks import along_key_blocks, layout_of_h, layout_of_sums
from .gluon_shared import barrier, copy_async
from .launch import launch
from .product_order import channel_at
from .weighted_mask import BAND_OCTAVES, BANDS, HALF_A_STEP

FEATURES = gl.constexpr(128)  # of a program
ROWS = gl.constexpr(128)  # query blocks of a tile
STEP = gl.constexpr(64)  # key blocks of a stage
STAGES = 3  # with two programs per multiprocessor the 100 KB of sm_86, 89 and 120 hold no more


@gluon.jit
def _copy(h_at, w_at, h_smem, w_smem, stage, start, blocks, COLUMNS: gl.constexpr, H_COPY: gl.constexpr):
    """Starts bringing key blocks ``start`` to ``start`` + STEP - 1."""
    # the weights are zero past the last block
    j = gl.minimum(start + gl.arange(0, STEP, gl.SliceLayout(1, H_COPY)), blocks - 1)
    copy_async(h_smem.index(stage), h_at + j.to(gl.int64)[:, None] * COLUMNS)
    copy_async(w_smem.index(stage), w_at + start)


@gluon.jit(do_not_specialize=["first_head", "rows", "blocks"])
def _mma_masked_sum(
    weights, scale, bands, sums, channel, out, first_head, rows, blocks, width,
    D: gl.constexpr, OUT_STRIDE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [4, 1], [16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 4)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, SUMS, 4)
    H_COPY: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    W_COPY: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [4, 1], [1, 0])
    LOAD: gl.constexpr = layout_of_h()
    STORE: gl.constexpr = layout_of_sums()
    COLUMNS: gl.constexpr = D * D
    h_smem = gl.allocate_shared_memory(gl.int8, [STAGES, STEP, FEATURES], gl.SwizzledSharedLayout(16, 1, 8, [1, 0]))
    w_smem = gl.allocate_shared_memory(gl.int8, [STAGES, ROWS, STEP], gl.SwizzledSharedLayout(16, 2, 4, [1, 0]))
    # row tiles run fastest: neighbours share one panel of h in L2
    m = gl.program_id(0)
    f = gl.program_id(1)
    slot = gl.program_id(2).to(gl.int64)
    h_at = sums + slot * blocks * COLUMNS + f * FEATURES + gl.arange(0, FEATURES, gl.SliceLayout(0, H_COPY))[None, :]
    i = gl.minimum(m * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, W_COPY)), rows - 1)
    w_rows = (
        weights + (slot * BANDS * rows + i[:, None]) * width + gl.arange(0, STEP, gl.SliceLayout(0, W_COPY))[None, :]
    )
    steps = (blocks + STEP - 1) // STEP
    acc = gl.zeros([FEATURES, ROWS], gl.int32, SUMS)
    for band in range(gl.load(bands + slot), 0, -1):
        acc = (acc + HALF_A_STEP) >> BAND_OCTAVES
        w_at = w_rows + (band - 1) * rows * width
        for stage in gl.static_range(STAGES - 1):
            if stage < steps:
                _copy(h_at, w_at, h_smem, w_smem, stage, stage * STEP, blocks, COLUMNS, H_COPY)
            async_copy.commit_group()
        for step in range(steps):
            async_copy.wait_group(STAGES - 2)
            barrier()
            # before the operands, which leave no registers for addresses; the last turn has read this stage
            ahead = step + STAGES - 1
            if ahead < steps:
                _copy(h_at, w_at, h_smem, w_smem, ahead % STAGES, ahead * STEP, blocks, COLUMNS, H_COPY)
            async_copy.commit_group()
            h = along_key_blocks(h_smem.index(step % STAGES).load(LOAD))
            left = gl.convert_layout(h, LEFT)
            right = w_smem.index(step % STAGES).permute([1, 0]).load(RIGHT)
            acc = mma_v2(left, right, acc)
        async_copy.wait_group(0)
        barrier()
    # the features as in the operand
    acc = acc.reshape([2, 4, 2, 8, ROWS]).permute([4, 1, 3, 0, 2]).reshape([ROWS, FEATURES])
    acc = gl.convert_layout(acc, STORE)
    feature = gl.arange(0, FEATURES, gl.SliceLayout(0, STORE))
    channels = gl.load(channel + (first_head + slot) * D + channel_at(feature % D, D)) * gl.load(scale + slot)
    value = (acc.to(gl.float32) * channels[None, :]).to(out.dtype.element_ty)
    # the rows of a thread lie a known distance apart: one address
    row = gl.arange(0, ROWS, gl.SliceLayout(1, STORE))
    out_at = (
        out + (slot * rows + m * ROWS) * OUT_STRIDE + (row[:, None] * OUT_STRIDE + (f * FEATURES + feature)[None, :])
    )
    gl.store(out_at, value, mask=(row < rows - m * ROWS)[:, None])


def mma_masked_sum(work, v_channel, group):
    """As int8_masked_sum() of masked_sum.py, with weights in register order."""
    rows, head_dim = work.query_sums.shape[1], work.norms.shape[2]
    blocks, columns = work.sums.shape[1:]
    launch(
        _mma_masked_sum, (block_count(rows, ROWS.value), columns // FEATURES.value, group.stop - group.start),
        work.weights, work.weights_scale, work.bands, work.sums, v_channel, work.query_sums,
        group.start, rows, blocks, work.weights.shape[3], D=head_dim, OUT_STRIDE=work.query_sums.stride(1), STAGES=STAGES, options={"num_warps": 4},
    )  # fmt: skip
