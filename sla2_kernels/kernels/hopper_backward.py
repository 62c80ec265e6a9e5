"""The two walks of the backward pass for Hopper (sm_90) in Gluon: what backward_queries.py and backward_keys.py compute.

One program of one warpgroup per 64 query rows or 64 keys, and two such programs at a time on each multiprocessor: while one
takes exponentials, the other multiplies. The program's own pair of tiles (Q and dO, or K and V) stays in shared memory; the
pairs that it walks over come by TMA, each while the one before is worked on.
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

from ..router import K_BLOCK, block_count
from .backward_keys import NO_ROW
from .backward_queries import MIN_RATIO
from .hopper_gluon import barrier, keep, load_async, new_barriers
from .launch import launch
from .numerics import NO_SCORE

HEAD_DIM, ROWS = 128, 64
D = gl.constexpr(HEAD_DIM)
TILE = gl.constexpr(ROWS)  # rows of every tile
KEY_BLOCK = gl.constexpr(K_BLOCK)
STAGES = gl.constexpr(2)  # pairs of tiles: the one that is worked on, and the next


@gluon.constexpr_function
def _scores():
    """Layout of a (64, 64) accumulator."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])


@gluon.constexpr_function
def _sums():
    """Layout of a (64, D) accumulator."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])


@gluon.jit
def _load_pair(desc0, desc1, b, h, row, bar, smem0, smem1, pred):
    """Two tiles of the same rows of two tensors, under way."""
    BYTES: gl.constexpr = 2 * TILE * D * desc0.dtype.primitive_bitwidth // 8
    mbarrier.expect(bar, BYTES, pred=pred)
    load_async(desc0, [b, h, row, 0], bar, smem0, pred=pred)
    load_async(desc1, [b, h, row, 0], bar, smem1, pred=pred)


@gluon.jit
def _tile(smem, stage):
    return smem.index(stage).reshape([TILE, D])


@gluon.jit
def _start_products(own0, own1, other0, other1):
    """own0 other0^T and own1 other1^T, (64, 64), under way."""
    zeros = gl.zeros([TILE, TILE], gl.float32, _scores())
    t0 = warpgroup_mma(own0, other0.permute([1, 0]), zeros, use_acc=False, is_async=True)
    t1 = warpgroup_mma(own1, other1.permute([1, 0]), zeros, use_acc=False, is_async=True)
    return t0, t1


@gluon.jit
def _as_operand(x, dtype: gl.constexpr):
    """A (64, 64) accumulator as the left operand of the next product: its registers are in place already."""
    return gl.convert_layout(x.to(dtype), gl.DotOperandLayout(0, _sums(), 2))


@gluon.jit
def _add_products(a0, a1, other0, other1, acc0, acc1):
    """acc0 + a0 other0 and acc1 + a1 other1, (64, D)."""
    t0 = warpgroup_mma(a0, other0, acc0, is_async=True)
    t1 = warpgroup_mma(a1, other1, acc1, is_async=True)
    acc0, acc1 = warpgroup_mma_wait(0, [t0, t1])
    keep(a0, 16)
    keep(a1, 16)
    return acc0, acc1


@gluon.jit
def _of_sums(x):
    """A row's value where the (64, D) accumulators have that row."""
    return gl.convert_layout(x, gl.SliceLayout(1, _sums()))[:, None]


@gluon.jit
def _add_keys(tiles, stage, first_key, state, k_tokens, scale_log2, RAGGED: gl.constexpr):
    """One key block of the walk of backward_queries.py, whose names these are."""
    q, g, k_smem, v_smem = tiles
    ds_k, p_k, ds_sum, p_sum, row_max, row_sum, product_sum, delta = state
    k = _tile(k_smem, stage)
    t0, t1 = _start_products(q, g, k, _tile(v_smem, stage))
    scores = warpgroup_mma_wait(1, [t0])
    if RAGGED:
        valid = (first_key + gl.arange(0, TILE, gl.SliceLayout(0, _scores())) < k_tokens)[None, :]
        scores = gl.where(valid, scores, NO_SCORE)
    new_max = gl.maximum(row_max, gl.max(scores, 1) * scale_log2)
    p = gl.exp2(scores * scale_log2 - new_max[:, None])
    if RAGGED:
        p = gl.where(valid, p, 0.0)
    correction = gl.exp2(row_max - new_max)
    row_sum = row_sum * correction + gl.sum(p, 1)
    # naming P here keeps its exponentials before the wait, beside dO V^T
    dp, p = warpgroup_mma_wait(0, [t1, p])
    product_sum = product_sum * correction + gl.sum(p * dp, 1)
    new_delta = product_sum / row_sum
    change = (new_delta - delta) * correction
    ds = (p * (dp - new_delta[:, None])).to(k.dtype)
    p = p.to(k.dtype)
    ds_sum = ds_sum * correction - change * p_sum + gl.sum(ds.to(gl.float32), 1)
    p_sum = p_sum * correction + gl.sum(p.to(gl.float32), 1)
    ds_k = ds_k * _of_sums(correction) - _of_sums(change) * p_k
    p_k = p_k * _of_sums(correction)
    ds_k, p_k = _add_products(_as_operand(ds, k.dtype), _as_operand(p, k.dtype), k, k, ds_k, p_k)
    return ds_k, p_k, ds_sum, p_sum, new_max, row_sum, product_sum, new_delta


@gluon.jit(do_not_specialize=["heads", "q_tokens", "k_tokens", "count"])
def _hopper_query_gradient(
    q_desc, g_desc, k_desc, v_desc, grad_q, selected, ratio, row_shift, row_delta, k_mean,
    out_stride_b, out_stride_h, out_stride_n, out_stride_d, heads, q_tokens, k_tokens, count, scale_log2, scale,
    QUERY_BLOCK: gl.constexpr,
):  # fmt: skip
    tile = gl.program_id(0)
    bh = gl.program_id(1)
    b = bh // heads
    h = bh % heads
    ROW: gl.constexpr = gl.SliceLayout(1, _scores())
    own_smem = gl.allocate_shared_memory(q_desc.dtype, [2, 1, 1, TILE, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, TILE, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, TILE, D], v_desc.layout)
    own_bar = new_barriers(1, 1)
    full = new_barriers(STAGES, 1)
    fence_async_shared()
    barrier()
    q_blocks = (q_tokens + QUERY_BLOCK - 1) // QUERY_BLOCK
    listed = selected + (bh.to(gl.int64) * q_blocks + tile // (QUERY_BLOCK // TILE)) * count
    # the last block alone may be ragged: it comes first, and the loop needs no masks
    first_key = gl.load(listed + count - 1) * KEY_BLOCK
    _load_pair(q_desc, g_desc, b, h, tile * TILE, own_bar.index(0), own_smem.index(0), own_smem.index(1), True)
    _load_pair(k_desc, v_desc, b, h, first_key, full.index(0), k_smem.index(0), v_smem.index(0), True)
    following = gl.load(listed) * KEY_BLOCK
    _load_pair(k_desc, v_desc, b, h, following, full.index(1), k_smem.index(1), v_smem.index(1), count > 1)
    mbarrier.wait(own_bar.index(0), 0)
    q = _tile(own_smem, 0)
    g = _tile(own_smem, 1)
    tiles = (q, g, k_smem, v_smem)

    zeros = gl.zeros([TILE, D], gl.float32, _sums())
    none = gl.zeros([TILE], gl.float32, ROW)
    state = (zeros, zeros, none, none, gl.full([TILE], NO_SCORE, gl.float32, ROW), none, none, none)
    mbarrier.wait(full.index(0), 0)
    ds_k, p_k, ds_sum, p_sum, row_max, row_sum, product_sum, delta = _add_keys(
        tiles, 0, first_key, state, k_tokens, scale_log2, True
    )
    for step in range(1, count):
        # every warp has left the stage that is filled next
        barrier()
        following = gl.load(listed + step) * KEY_BLOCK
        free = (step + 1) % STAGES
        more = step + 1 < count
        _load_pair(k_desc, v_desc, b, h, following, full.index(free), k_smem.index(free), v_smem.index(free), more)
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        state = (ds_k, p_k, ds_sum, p_sum, row_max, row_sum, product_sum, delta)
        ds_k, p_k, ds_sum, p_sum, row_max, row_sum, product_sum, delta = _add_keys(
            tiles, stage, 0, state, k_tokens, scale_log2, False
        )

    rows = tile.to(gl.int64) * TILE + gl.arange(0, TILE, ROW)
    inside = rows < q_tokens
    row_at = bh.to(gl.int64) * q_tokens + rows
    row_ratio = gl.load(ratio + row_at, mask=inside, other=1.0)
    shift = row_max + gl.log2(row_sum) - gl.log2(gl.maximum(row_ratio, MIN_RATIO))
    gl.store(row_shift + row_at, shift, mask=inside)
    gl.store(row_delta + row_at, delta, mask=inside)
    d = gl.arange(0, D, gl.SliceLayout(0, _sums()))
    mean = gl.load(k_mean + bh * D + d)
    dq = (ds_k - _of_sums(ds_sum) * mean[None, :]) * _of_sums(row_ratio * scale / row_sum)
    out_rows = tile.to(gl.int64) * TILE + gl.arange(0, TILE, gl.SliceLayout(1, _sums()))
    out_at = grad_q + b.to(gl.int64) * out_stride_b + h.to(gl.int64) * out_stride_h
    out_at = out_at + out_rows[:, None] * out_stride_n + d[None, :] * out_stride_d
    gl.store(out_at, dq.to(grad_q.dtype.element_ty), mask=(out_rows < q_tokens)[:, None])


@gluon.jit(do_not_specialize=["heads", "q_tokens", "k_tokens", "pairs"])
def _hopper_key_gradient(
    q_desc, g_desc, k_desc, v_desc, grad_k, grad_v, query_blocks, starts, row_shift, row_delta, k_correction,
    gk_stride_b, gk_stride_h, gk_stride_n, gk_stride_d, gv_stride_b, gv_stride_h, gv_stride_n, gv_stride_d,
    heads, q_tokens, k_tokens, pairs, scale_log2, scale, QUERY_BLOCK: gl.constexpr, LINEAR: gl.constexpr,
):  # fmt: skip
    tile = gl.program_id(0)
    bh = gl.program_id(1)
    b = bh // heads
    h = bh % heads
    TILES: gl.constexpr = QUERY_BLOCK // TILE  # of a query block
    own_smem = gl.allocate_shared_memory(k_desc.dtype, [2, 1, 1, TILE, D], k_desc.layout)
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, TILE, D], q_desc.layout)
    g_smem = gl.allocate_shared_memory(g_desc.dtype, [STAGES, 1, 1, TILE, D], g_desc.layout)
    own_bar = new_barriers(1, 1)
    full = new_barriers(STAGES, 1)
    fence_async_shared()
    barrier()
    starts += bh.to(gl.int64) * ((k_tokens + KEY_BLOCK - 1) // KEY_BLOCK + 1) + tile
    first = gl.load(starts)
    steps = TILES * (gl.load(starts + 1) - first)
    listed = query_blocks + bh.to(gl.int64) * pairs + first
    row_shift += bh.to(gl.int64) * q_tokens
    row_delta += bh.to(gl.int64) * q_tokens
    _load_pair(k_desc, v_desc, b, h, tile * TILE, own_bar.index(0), own_smem.index(0), own_smem.index(1), True)
    # a list may be empty, and a step that is not there reads no number of a block
    row = gl.load(listed, mask=steps > 0, other=0) * QUERY_BLOCK
    _load_pair(q_desc, g_desc, b, h, row, full.index(0), q_smem.index(0), g_smem.index(0), steps > 0)
    mbarrier.wait(own_bar.index(0), 0)
    k = _tile(own_smem, 0)
    v = _tile(own_smem, 1)
    dtype: gl.constexpr = q_desc.dtype

    dk = gl.zeros([TILE, D], gl.float32, _sums())
    dv = gl.zeros([TILE, D], gl.float32, _sums())
    for step in range(0, steps):
        # every warp has left the stage that is filled next
        barrier()
        after = step + 1
        more = after < steps
        following = gl.load(listed + after // TILES, mask=more, other=0) * QUERY_BLOCK + after % TILES * TILE
        free = after % STAGES
        _load_pair(q_desc, g_desc, b, h, following, full.index(free), q_smem.index(free), g_smem.index(free), more)
        rows = row + gl.arange(0, TILE, gl.SliceLayout(0, _scores()))
        shift = gl.load(row_shift + rows, mask=rows < q_tokens, other=NO_ROW)
        delta = gl.load(row_delta + rows, mask=rows < q_tokens, other=0.0)
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        q = _tile(q_smem, stage)
        g = _tile(g_smem, stage)
        t0, t1 = _start_products(k, v, q, g)
        scores = warpgroup_mma_wait(1, [t0])
        p = gl.exp2(scores * scale_log2 - shift[None, :])
        # naming P here keeps its exponentials before the wait, beside V dO^T
        dp, p = warpgroup_mma_wait(0, [t1, p])
        ds = p * (dp - delta[None, :])
        dv, dk = _add_products(_as_operand(p, dtype), _as_operand(ds, dtype), g, q, dv, dk)
        row = following

    keys = tile.to(gl.int64) * TILE + gl.arange(0, TILE, gl.SliceLayout(1, _sums()))
    d = gl.arange(0, D, gl.SliceLayout(0, _sums()))
    inside = (keys < k_tokens)[:, None]
    gk_at = grad_k + b.to(gl.int64) * gk_stride_b + h.to(gl.int64) * gk_stride_h
    gk_at = gk_at + keys[:, None] * gk_stride_n + d[None, :] * gk_stride_d
    gv_at = grad_v + b.to(gl.int64) * gv_stride_b + h.to(gl.int64) * gv_stride_h
    gv_at = gv_at + keys[:, None] * gv_stride_n + d[None, :] * gv_stride_d
    dk = dk * scale
    if LINEAR:
        dk += gl.load(gk_at, mask=inside, other=0.0).to(gl.float32) - gl.load(k_correction + bh * D + d)[None, :]
        dv += gl.load(gv_at, mask=inside, other=0.0).to(gl.float32)
    gl.store(gk_at, dk.to(grad_k.dtype.element_ty), mask=inside)
    gl.store(gv_at, dv.to(grad_v.dtype.element_ty), mask=inside)


def _descriptors(*tensors):
    """TMA descriptors of (B, H, N, D) tensors, any 16-byte strides, in tiles of 64 rows."""
    layout = gl.NVMMASharedLayout(128, 16, rank=4)
    return [TensorDescriptor.from_tensor(tensor, [1, 1, ROWS, HEAD_DIM], layout) for tensor in tensors]


def hopper_query_gradient(
    q, k, v, grad_out, grad_q, selected, ratio, row_shift, row_delta, k_mean, *, scale, scale_log2, query_block
):
    """As query_gradient() of backward_queries.py, for calls whose q, k, v and grad_out TMA can copy."""
    batch, heads, tokens, _ = q.shape
    launch(
        _hopper_query_gradient, (block_count(tokens, ROWS), batch * heads),
        *_descriptors(q, grad_out, k, v), grad_q, selected, ratio, row_shift, row_delta, k_mean,
        *grad_q.stride(), heads, tokens, k.shape[2], selected.shape[2], scale_log2, scale,
        QUERY_BLOCK=query_block, options={"num_warps": 4},
    )  # fmt: skip


def hopper_key_gradients(
    q, k, v, grad_out, grad_k, grad_v, transposed, row_shift, row_delta, k_correction, *, scale, scale_log2, query_block
):
    """As key_gradients() of backward_keys.py, for calls whose q, k, v and grad_out TMA can copy."""
    batch, heads, tokens, _ = k.shape
    query_blocks, starts = transposed
    launch(
        _hopper_key_gradient, (block_count(tokens, K_BLOCK), batch * heads),
        *_descriptors(q, grad_out, k, v), grad_k, grad_v, query_blocks, starts, row_shift, row_delta, k_correction,
        *grad_k.stride(), *grad_v.stride(), heads, q.shape[2], tokens, query_blocks.shape[1], scale_log2, scale,
        QUERY_BLOCK=query_block, LINEAR=k_correction is not None, options={"num_warps": 4},
    )  # fmt: skip
