"""The two walks of the backward pass for Hopper (sm_90) in Gluon: what backward_queries.py and backward_keys.py compute.

A producer warp brings tiles by TMA through a ring of stages, consumer warpgroups of 64 query rows or 64 keys multiply: while
one takes exponentials, the other's products run. In the walk for dQ the two consumers of a program share the pairs of K and
V tiles that come, and go through tile after tile; in the walk for dK and dV a program has one consumer, and two programs
share a multiprocessor.

The arithmetic of the walk for dQ is not quite Triton's. Its running maximum and delta stay as they are until P, summed over
the 16 keys of a row that a thread holds, exceeds LIMIT: most steps need no block's maximum and rescale nothing, P may reach
LIMIT, and dS is rounded after delta is subtracted, when it is small. A step that exceeds it takes its scores a second time.
delta comes from the sums of the rounded P and dS, so that each row of dS sums to zero and K's mean has no part in dQ.
"""

from dataclasses import dataclass

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..router import K_BLOCK, Q_BLOCK, block_count
from .backward_queries import MIN_RATIO
from .gluon_shared import (
    barrier,
    copy_async,
    keep,
    leave,
    load_async,
    new_barriers,
    programs,
    store_async,
    wait_empty,
    wait_full,
)
from .launch import launch
from .numerics import NO_SCORE

HEAD_DIM, ROWS = 128, 64
D = gl.constexpr(HEAD_DIM)
TILE = gl.constexpr(ROWS)  # rows of every tile
KEY_BLOCK = gl.constexpr(K_BLOCK)
LIMIT = gl.constexpr(16.0)


@dataclass(frozen=True)
class Walk:
    """consumers: warpgroups that multiply. stages: pairs of tiles in flight. own_stages: of the program's own pairs.

    resident: programs per multiprocessor. options: Triton's.
    """

    consumers: int
    stages: int
    own_stages: int
    resident: int
    options: dict


PAIRED = Walk(2, 3, 2, resident=1, options={"num_warps": 4})
ALONE = Walk(1, 2, 1, resident=2, options={"num_warps": 4, "maxnreg": 128})


def query_walk(query_block):
    """The walk for dQ: a query block of 128 rows is two consumers' work."""
    return PAIRED if query_block == Q_BLOCK else ALONE


@gluon.constexpr_function
def _scores():
    """Layout of a (64, 64) accumulator."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])


@gluon.constexpr_function
def _sums():
    """Layout of a (64, D) accumulator."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])


@gluon.constexpr_function
def _in_order():
    """Layout of 64 numbers that one warp copies."""
    return gl.BlockedLayout([1], [32], [1], [0])


@gluon.jit
def _load_pair(desc0, desc1, b, h, row, bar, smem0, smem1):
    """Two tiles of the same rows of two tensors, under way; the barrier expects them already."""
    load_async(desc0, [b, h, row, 0], bar, smem0)
    load_async(desc1, [b, h, row, 0], bar, smem1)


@gluon.jit
def _expect_pairs(desc, bar, PAIRS: gl.constexpr):
    mbarrier.expect(bar, PAIRS * 2 * TILE * D * desc.dtype.primitive_bitwidth // 8)


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
def _widened(x):
    """16 bits as float32, bfloat16 two numbers at a time. Never taken from an earlier call, which would hold 32 registers."""
    if x.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            """
            shl.b32 $0, $2, 16;
            and.b32 $1, $2, 0xffff0000;
            """,
            "=f,=f,r", [x], dtype=gl.float32, is_pure=False, pack=2,
        )  # fmt: skip
    else:
        return x.to(gl.float32)


@gluon.jit
def _sum_in_threads(x):
    """(64, 4): sums over those columns of a (64, 64) accumulator's rows that one thread holds."""
    return gl.sum(gl.sum(x.reshape([TILE, TILE // 8, 4, 2]), 3), 1)


@gluon.jit
def _row_sums(x):
    """The whole rows' sums, of those that _sum_in_threads() makes."""
    return gl.convert_layout(gl.sum(x, 1), gl.SliceLayout(1, _scores()))


@gluon.jit
def _beside(x, sums):
    """A row's value where sums of _sum_in_threads() have that row."""
    return gl.convert_layout(x, gl.SliceLayout(1, sums.type.layout))[:, None]


@gluon.jit
def _any_above(sums, limit: gl.constexpr, smem):
    """Whether any of the sums of _sum_in_threads() exceeds limit; smem: int32 (4, 8, 4), one number per thread."""
    of_thread = gl.max(sums.reshape([4, 2, 8, 4]), 1)
    of_warp = gl.inline_asm_elementwise(
        """
        {
        .reg .pred above;
        setp.gt.f32 above, $1, $2;
        vote.sync.any.pred above, above, 0xffffffff;
        selp.b32 $0, 1, 0, above;
        }
        """,
        "=r,f,f", [of_thread, limit], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    smem.store(of_warp)
    # one thread's number of each warp, and every thread reads all four
    EVERYWHERE: gl.constexpr = gl.BlockedLayout([4, 1, 1], [1, 32, 1], [1, 4, 1], [0, 1, 2])
    of_warps = smem.slice(0, 1, dim=1).slice(0, 1, dim=2).load(EVERYWHERE)
    return gl.max(gl.max(gl.max(of_warps, 2), 1), 0) > 0


@gluon.jit
def _of_sums(x):
    """A row's value where the (64, D) accumulators have that row."""
    return gl.convert_layout(x, gl.SliceLayout(1, _sums()))[:, None]


@gluon.jit
def _rows_at(x, strides, b, h, rows, d):
    """Addresses of rows of one head of a (B, H, N, D) tensor."""
    stride_b, stride_h, stride_n, stride_d = strides
    plane = x + b.to(gl.int64) * stride_b + h.to(gl.int64) * stride_h
    return plane + rows.to(gl.int64)[:, None] * stride_n + d[None, :] * stride_d


@gluon.jit
def _query_tile_at(tile, row_tiles, QUERY_BLOCK: gl.constexpr, CONSUMERS: gl.constexpr):
    """(head, first tile of 64 rows, query block) of a program's turn."""
    turns = row_tiles // CONSUMERS
    first = tile % turns * CONSUMERS
    return tile // turns, first, first // (QUERY_BLOCK // TILE)


@gluon.jit
def _produce_keys(descriptors, own_ring, ring, selected, sizes, QUERY_BLOCK: gl.constexpr):
    """One warp: fills a stage of the program's own ring per turn, Q and dO, and a stage of K and V per key block."""
    q_desc, g_desc, k_desc, v_desc = descriptors
    own_smem, own_full, own_empty = own_ring
    k_smem, v_smem, full, empty = ring
    heads, row_tiles, count, tiles = sizes
    CONSUMERS: gl.constexpr = own_smem.shape[0] // own_full.shape[0] // 2
    turn = 0
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        bh, first, q_block = _query_tile_at(tile, row_tiles, QUERY_BLOCK, CONSUMERS)
        b = bh // heads
        h = bh % heads
        listed = selected + (bh.to(gl.int64) * (row_tiles // (QUERY_BLOCK // TILE)) + q_block) * count
        # the last block alone may be ragged: it comes first, and the other steps need no masks
        block = gl.load(listed + count - 1)
        place = wait_empty(own_empty, turn)
        bar = own_full.index(place)
        _expect_pairs(q_desc, bar, CONSUMERS)
        for part in gl.static_range(CONSUMERS):
            at = 2 * (CONSUMERS * place + part)
            _load_pair(q_desc, g_desc, b, h, (first + part) * TILE, bar, own_smem.index(at), own_smem.index(at + 1))
        turn += 1
        for s in range(count):
            following = gl.load(listed + s)
            stage = wait_empty(empty, step)
            bar = full.index(stage)
            _expect_pairs(k_desc, bar, 1)
            _load_pair(k_desc, v_desc, b, h, block * KEY_BLOCK, bar, k_smem.index(stage), v_smem.index(stage))
            block = following
            step += 1


@gluon.jit
def _add_keys(q, g, ring, step, first_key, state, k_tokens, scale_log2, FIRST: gl.constexpr):
    """One key block of the walk of backward_queries.py, whose names these are.

    ds_sum is over the rounded dS, p_sum over P, both as _sum_in_threads() makes them.
    """
    k_smem, v_smem, above_smem, full, empty = ring
    ds_k, p_k, ds_sum, p_sum, row_max, delta = state
    stage = wait_full(full, step)
    k = _tile(k_smem, stage)
    t0, t1 = _start_products(q, g, k, _tile(v_smem, stage))
    scores = warpgroup_mma_wait(1, [t0])
    if FIRST:
        valid = (first_key + gl.arange(0, TILE, gl.SliceLayout(0, _scores())) < k_tokens)[None, :]
        scores = gl.where(valid, scores, NO_SCORE)
        row_max = gl.max(scores, 1) * scale_log2
    p = gl.exp2(scores * scale_log2 - row_max[:, None])
    if FIRST:
        p = gl.where(valid, p, 0.0)
    p = p.to(k.dtype)
    p_added = _sum_in_threads(_widened(p))
    if not FIRST:
        # infinity too
        if _any_above(p_added, LIMIT, above_smem):
            dp = warpgroup_mma_wait(0, [t1])
            zeros = gl.zeros([TILE, TILE], gl.float32, _scores())
            scores = warpgroup_mma(q, k.permute([1, 0]), zeros, use_acc=False)
            new_max = gl.maximum(row_max, gl.max(scores, 1) * scale_log2)
            p = gl.exp2(scores * scale_log2 - new_max[:, None]).to(k.dtype)
            p_added = _sum_in_threads(_widened(p))
            correction = gl.exp2(row_max - new_max)
            row_max = new_max
            p_sum = p_sum * _beside(correction, p_sum)
            ds_sum = ds_sum * _beside(correction, p_sum)
            change = (_row_sums(ds_sum) + gl.sum(_widened(p) * (dp - delta[:, None]), 1)) / _row_sums(p_sum + p_added)
            delta = delta + change
            ds_sum = ds_sum - _beside(change, p_sum) * p_sum
            p_k = p_k * _of_sums(correction)
            ds_k = ds_k * _of_sums(correction) - _of_sums(change) * p_k
    # asking for P K first keeps the exponentials before the wait, beside dO V^T
    c = _as_operand(p, k.dtype)
    p_t = warpgroup_mma(c, k, p_k, is_async=True)
    dp = warpgroup_mma_wait(1, [t1])
    p = _widened(p)
    if FIRST:
        delta = gl.sum(p * dp, 1) / gl.sum(p, 1)
    ds = (p * (dp - delta[:, None])).to(k.dtype)
    a = _as_operand(ds, k.dtype)
    ds_t = warpgroup_mma(a, k, ds_k, is_async=True)
    ds_added = _sum_in_threads(_widened(ds))
    if FIRST:
        p_sum = p_added
        ds_sum = ds_added
    else:
        p_sum = p_sum + p_added
        ds_sum = ds_sum + ds_added
    ds_k, p_k = warpgroup_mma_wait(0, [ds_t, p_t])
    keep(a, 16)
    keep(c, 16)
    leave(empty, step)
    return ds_k, p_k, ds_sum, p_sum, row_max, delta


@gluon.jit
def _consume_keys(PART: gl.constexpr, own_ring, ring, inputs, outputs, sizes, QUERY_BLOCK: gl.constexpr):
    """One warpgroup: the PART-th 64 query rows of every turn of this program."""
    own_smem, own_full, own_empty = own_ring
    k_smem, v_smem, above_smem, full, empty = ring
    ring = (k_smem, v_smem, above_smem.index(PART), full, empty)
    selected, ratio = inputs
    grad_q, row_shift, row_delta, strides = outputs
    heads, q_tokens, k_tokens, row_tiles, count, tiles, scale_log2, scale = sizes
    CONSUMERS: gl.constexpr = own_smem.shape[0] // own_full.shape[0] // 2
    ROW: gl.constexpr = gl.SliceLayout(1, _scores())
    turn = 0
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        bh, first, q_block = _query_tile_at(tile, row_tiles, QUERY_BLOCK, CONSUMERS)
        last = (bh.to(gl.int64) * (row_tiles // (QUERY_BLOCK // TILE)) + q_block) * count + count - 1
        first_key = gl.load(selected + last) * KEY_BLOCK
        place = wait_full(own_full, turn)
        q = _tile(own_smem, 2 * (CONSUMERS * place + PART))
        g = _tile(own_smem, 2 * (CONSUMERS * place + PART) + 1)
        zeros = gl.zeros([TILE, D], gl.float32, _sums())
        none = gl.zeros([TILE], gl.float32, ROW)
        nothing = (zeros, zeros, none, none, none, none)
        ds_k, p_k, ds_sum, p_sum, row_max, delta = _add_keys(
            q, g, ring, step, first_key, nothing, k_tokens, scale_log2, True
        )
        step += 1
        for _ in range(1, count):
            state = (ds_k, p_k, ds_sum, p_sum, row_max, delta)
            ds_k, p_k, ds_sum, p_sum, row_max, delta = _add_keys(
                q, g, ring, step, 0, state, k_tokens, scale_log2, False
            )
            step += 1
        leave(own_empty, turn)
        turn += 1
        p_sum = _row_sums(p_sum)

        rows = (first + PART) * TILE + gl.arange(0, TILE, ROW)
        inside = rows < q_tokens
        row_at = bh.to(gl.int64) * q_tokens + rows
        row_ratio = gl.load(ratio + row_at, mask=inside, other=1.0)
        change = _row_sums(ds_sum) / p_sum
        gl.store(row_shift + row_at, row_max + gl.log2(p_sum) - gl.log2(gl.maximum(row_ratio, MIN_RATIO)), mask=inside)
        gl.store(row_delta + row_at, delta + change, mask=inside)
        dq = (ds_k - _of_sums(change) * p_k) * _of_sums(row_ratio * scale / p_sum)
        out_rows = (first + PART) * TILE + gl.arange(0, TILE, gl.SliceLayout(1, _sums()))
        d = gl.arange(0, D, gl.SliceLayout(0, _sums()))
        out_at = _rows_at(grad_q, strides, bh // heads, bh % heads, out_rows, d)
        gl.store(out_at, dq.to(grad_q.dtype.element_ty), mask=(out_rows < q_tokens)[:, None])


@gluon.jit(do_not_specialize=["heads", "q_tokens", "k_tokens", "row_tiles", "count", "tiles"])
def _hopper_query_gradient(
    q_desc, g_desc, k_desc, v_desc, grad_q, selected, ratio, row_shift, row_delta,
    out_stride_b, out_stride_h, out_stride_n, out_stride_d,
    heads, q_tokens, k_tokens, row_tiles, count, tiles, scale_log2, scale,
    QUERY_BLOCK: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, OWN_STAGES: gl.constexpr,
):  # fmt: skip
    UPPER: gl.constexpr = 0
    LOWER: gl.constexpr = 1
    own_smem = gl.allocate_shared_memory(q_desc.dtype, [2 * CONSUMERS * OWN_STAGES, 1, 1, TILE, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, TILE, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, TILE, D], v_desc.layout)
    above_smem = gl.allocate_shared_memory(gl.int32, [CONSUMERS, 4, 8, 4], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    own_full = new_barriers(OWN_STAGES, 1)
    own_empty = new_barriers(OWN_STAGES, CONSUMERS)
    full = new_barriers(STAGES, 1)
    empty = new_barriers(STAGES, CONSUMERS)
    fence_async_shared()
    # constants survive only in tuples written in the call itself
    if CONSUMERS == 1:
        gl.warp_specialize([
            (_consume_keys, (
                UPPER, (own_smem, own_full, own_empty), (k_smem, v_smem, above_smem, full, empty), (selected, ratio),
                (grad_q, row_shift, row_delta, (out_stride_b, out_stride_h, out_stride_n, out_stride_d)),
                (heads, q_tokens, k_tokens, row_tiles, count, tiles, scale_log2, scale), QUERY_BLOCK,
            )),
            (_produce_keys, (
                (q_desc, g_desc, k_desc, v_desc), (own_smem, own_full, own_empty), (k_smem, v_smem, full, empty), selected,
                (heads, row_tiles, count, tiles), QUERY_BLOCK,
            )),
        ], [1], [24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume_keys, (
                UPPER, (own_smem, own_full, own_empty), (k_smem, v_smem, above_smem, full, empty), (selected, ratio),
                (grad_q, row_shift, row_delta, (out_stride_b, out_stride_h, out_stride_n, out_stride_d)),
                (heads, q_tokens, k_tokens, row_tiles, count, tiles, scale_log2, scale), QUERY_BLOCK,
            )),
            (_consume_keys, (
                LOWER, (own_smem, own_full, own_empty), (k_smem, v_smem, above_smem, full, empty), (selected, ratio),
                (grad_q, row_shift, row_delta, (out_stride_b, out_stride_h, out_stride_n, out_stride_d)),
                (heads, q_tokens, k_tokens, row_tiles, count, tiles, scale_log2, scale), QUERY_BLOCK,
            )),
            (_produce_keys, (
                (q_desc, g_desc, k_desc, v_desc), (own_smem, own_full, own_empty), (k_smem, v_smem, full, empty), selected,
                (heads, row_tiles, count, tiles), QUERY_BLOCK,
            )),
        ], [4, 1], [240, 24])  # fmt: skip


@gluon.jit
def _produce_queries(
    descriptors, own_ring, ring, listed, numbers, place, sizes, QUERY_BLOCK: gl.constexpr, LINEAR: gl.constexpr
):
    """One warp: K and V of the program's key block, then a stage per 64 rows of the listed query blocks: Q, dO, and the
    rows' shift and delta, which TMA does not copy from rows of any length. At the end a stage of the linear branch's share."""
    q_desc, g_desc, k_desc, v_desc, gk_desc, gv_desc = descriptors
    own_smem, own_full = own_ring
    q_smem, g_smem, numbers_smem, full, empty = ring
    row_shift, row_delta, k_correction = numbers
    b, h, tile = place
    steps, heads, q_tokens = sizes
    TILES: gl.constexpr = QUERY_BLOCK // TILE
    # a list may be empty, and a step that is not there reads no number of a block
    block = gl.load(listed, mask=steps > 0, other=0)
    _expect_pairs(k_desc, own_full.index(0), 1)
    _load_pair(k_desc, v_desc, b, h, tile * TILE, own_full.index(0), own_smem.index(0), own_smem.index(1))
    for step in range(steps):
        after = step + 1
        following = gl.load(listed + after // TILES, mask=after < steps, other=0)
        stage = wait_empty(empty, step)
        bar = full.index(stage)
        _expect_pairs(q_desc, bar, 1)
        row = block * QUERY_BLOCK + step % TILES * TILE
        _load_pair(q_desc, g_desc, b, h, row, bar, q_smem.index(stage), g_smem.index(stage))
        # zeros past the end, where Q and dO are zeros too: such rows add nothing
        rows = row + gl.arange(0, TILE, _in_order())
        copy_async(numbers_smem.index(stage).slice(0, TILE), row_shift + rows, mask=rows < q_tokens)
        copy_async(numbers_smem.index(stage).slice(TILE, TILE), row_delta + rows, mask=rows < q_tokens)
        async_copy.mbarrier_arrive(bar, increment_count=False)
        block = following
    if LINEAR:
        stage = wait_empty(empty, steps)
        bar = full.index(stage)
        _expect_pairs(gk_desc, bar, 1)
        _load_pair(gk_desc, gv_desc, b, h, tile * TILE, bar, q_smem.index(stage), g_smem.index(stage))
        copy_async(numbers_smem.index(stage), k_correction + (b * heads + h) * D + gl.arange(0, D, _in_order()))
        async_copy.mbarrier_arrive(bar, increment_count=False)


@gluon.jit
def _consume_queries(own_ring, ring, outputs, place, sizes, LINEAR: gl.constexpr):
    """The program's warpgroup: dK and dV of its key block."""
    own_smem, own_full = own_ring
    q_smem, g_smem, numbers_smem, full, empty = ring
    gk_desc, gv_desc = outputs
    b, h, tile = place
    steps, scale_log2, scale = sizes
    COLUMN: gl.constexpr = gl.SliceLayout(0, _scores())
    dtype: gl.constexpr = q_smem.dtype
    dk = gl.zeros([TILE, D], gl.float32, _sums())
    dv = gl.zeros([TILE, D], gl.float32, _sums())
    mbarrier.wait(own_full.index(0), 0)
    k = _tile(own_smem, 0)
    v = _tile(own_smem, 1)
    for step in range(steps):
        stage = wait_full(full, step)
        q = _tile(q_smem, stage)
        g = _tile(g_smem, stage)
        t0, t1 = _start_products(k, v, q, g)
        shift = numbers_smem.index(stage).slice(0, TILE).load(COLUMN)
        scores = warpgroup_mma_wait(1, [t0])
        p = gl.exp2(scores * scale_log2 - shift[None, :])
        delta = numbers_smem.index(stage).slice(TILE, TILE).load(COLUMN)
        a = _as_operand(p, dtype)
        dv_t = warpgroup_mma(a, g, dv, is_async=True)
        dp = warpgroup_mma_wait(1, [t1])
        ds = _as_operand(p * (dp - delta[None, :]), dtype)
        dk_t = warpgroup_mma(ds, q, dk, is_async=True)
        dv, dk = warpgroup_mma_wait(0, [dv_t, dk_t])
        keep(a, 16)
        keep(ds, 16)
        leave(empty, step)

    dk = dk * scale
    if LINEAR:
        stage = wait_full(full, steps)
        correction = numbers_smem.index(stage).load(gl.SliceLayout(0, _sums()))
        dk += _tile(q_smem, stage).load(_sums()).to(gl.float32) - correction[None, :]
        dv += _tile(g_smem, stage).load(_sums()).to(gl.float32)
    # every warp's products have read what is written now
    barrier()
    k.store(dk.to(dtype))
    v.store(dv.to(dtype))
    fence_async_shared()
    store_async(gk_desc, [b, h, tile * TILE, 0], own_smem.index(0))
    store_async(gv_desc, [b, h, tile * TILE, 0], own_smem.index(1))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["heads", "q_tokens", "k_tokens", "pairs"])
def _hopper_key_gradient(
    q_desc, g_desc, k_desc, v_desc, gk_desc, gv_desc, query_blocks, starts, row_shift, row_delta, k_correction,
    heads, q_tokens, k_tokens, pairs, scale_log2, scale,
    QUERY_BLOCK: gl.constexpr, LINEAR: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    tile = gl.program_id(0)
    bh = gl.program_id(1)
    b = bh // heads
    h = bh % heads
    wide = bh.to(gl.int64)
    own_smem = gl.allocate_shared_memory(k_desc.dtype, [2, 1, 1, TILE, D], k_desc.layout)
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, TILE, D], q_desc.layout)
    g_smem = gl.allocate_shared_memory(g_desc.dtype, [STAGES, 1, 1, TILE, D], g_desc.layout)
    # shift and delta of 64 rows, or the correction
    numbers_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 2 * TILE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    own_full = new_barriers(1, 1)
    # arrivals: the expectation of TMA's bytes, and each thread's copies of numbers
    full = new_barriers(STAGES, 1 + 32)
    empty = new_barriers(STAGES, 1)
    fence_async_shared()
    starts += wide * ((k_tokens + KEY_BLOCK - 1) // KEY_BLOCK + 1) + tile
    first = gl.load(starts)
    steps = (QUERY_BLOCK // TILE) * (gl.load(starts + 1) - first)
    listed = query_blocks + wide * pairs + first
    # constants survive only in tuples written in the call itself
    gl.warp_specialize([
        (_consume_queries, (
            (own_smem, own_full), (q_smem, g_smem, numbers_smem, full, empty), (gk_desc, gv_desc), (b, h, tile),
            (steps, scale_log2, scale), LINEAR,
        )),
        (_produce_queries, (
            (q_desc, g_desc, k_desc, v_desc, gk_desc, gv_desc), (own_smem, own_full),
            (q_smem, g_smem, numbers_smem, full, empty), listed,
            (row_shift + wide * q_tokens, row_delta + wide * q_tokens, k_correction), (b, h, tile),
            (steps, heads, q_tokens), QUERY_BLOCK, LINEAR,
        )),
    ], [1], [24])  # fmt: skip


def _descriptors(*tensors):
    """TMA descriptors of (B, H, N, D) tensors, any 16-byte strides, in tiles of 64 rows."""
    layout = gl.NVMMASharedLayout(128, 16, rank=4)
    return [TensorDescriptor.from_tensor(tensor, [1, 1, ROWS, HEAD_DIM], layout) for tensor in tensors]


def hopper_query_gradient(
    q, k, v, grad_out, grad_q, selected, ratio, row_shift, row_delta, *, scale, scale_log2, query_block
):
    """As query_gradient() of backward_queries.py, for calls whose q, k, v and grad_out TMA can copy."""
    batch, heads, tokens, _ = q.shape
    walk = query_walk(query_block)
    row_tiles = block_count(tokens, query_block) * (query_block // ROWS)
    tiles = batch * heads * row_tiles // walk.consumers
    launch(
        _hopper_query_gradient, (min(tiles, walk.resident * programs(q.device)),),
        *_descriptors(q, grad_out, k, v), grad_q, selected, ratio, row_shift, row_delta,
        *grad_q.stride(), heads, tokens, k.shape[2], row_tiles, selected.shape[2], tiles, scale_log2, scale,
        QUERY_BLOCK=query_block, CONSUMERS=walk.consumers, STAGES=walk.stages, OWN_STAGES=walk.own_stages,
        options=walk.options,
    )  # fmt: skip


def hopper_key_gradients(
    q, k, v, grad_out, grad_k, grad_v, transposed, row_shift, row_delta, k_correction, *, scale, scale_log2, query_block
):
    """As key_gradients() of backward_keys.py, for calls whose q, k, v and grad_out TMA can copy. A tile is one key block."""
    batch, heads, tokens, _ = k.shape
    query_blocks, starts = transposed
    launch(
        _hopper_key_gradient, (block_count(tokens, K_BLOCK), batch * heads),
        *_descriptors(q, grad_out, k, v, grad_k, grad_v), query_blocks, starts, row_shift, row_delta,
        # warp_specialize() passes no None on: any float32 tensor stands in
        row_delta if k_correction is None else k_correction,
        heads, q.shape[2], tokens, query_blocks.shape[1], scale_log2, scale,
        QUERY_BLOCK=query_block, LINEAR=k_correction is not None, STAGES=ALONE.stages, options=ALONE.options,
    )  # fmt: skip
