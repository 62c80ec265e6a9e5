"""Gradients of the linear branch for Hopper (sm_90) in Gluon, where its sums are in bfloat16: what backward_linear.py
computes, and what pack.py does for it.

The kernels only move memory: tiles come and go by TMA, and each program makes all that its tiles are needed for, in one go.
rowsum(dO O_l) needs no product of its own: sum over e of dO_e (phi H)_e is the sum over d of phi_d (dO H^T)_d.
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

from ..router import K_BLOCK, block_count
from .gluon_shared import barrier, keep, load_async, new_barriers, reinterpret, store_async
from .launch import launch
from .numerics import LOG2_E, MIN_LINEAR_WEIGHT

HEAD_DIM = 128
D = gl.constexpr(HEAD_DIM)
KEYS = gl.constexpr(K_BLOCK)


@gluon.constexpr_function
def _sums(rows):
    """Layout of a (rows, D) accumulator, 16 rows to a warp."""
    return gl.NVMMADistributedLayout([3, 0], [rows // 16, 1], [16, 128, 16])


@gluon.jit
def _phi(x):
    """softmax over the features of (rows, D)."""
    exponentials = gl.exp2(x * LOG2_E - (gl.max(x, 1) * LOG2_E)[:, None])
    return exponentials * (1.0 / gl.sum(exponentials, 1))[:, None]


@gluon.jit(do_not_specialize=["heads", "first_head", "tokens"])
def _hopper_linear_sums(k_desc, v_desc, sums_desc, k_mean, sums, heads, first_head, tokens):
    block = gl.program_id(0)
    slot = gl.program_id(1)
    bh = first_head + slot
    b = bh // heads
    h = bh % heads
    ACC: gl.constexpr = _sums(KEYS)
    kv_smem = gl.allocate_shared_memory(k_desc.dtype, [2, 1, 1, KEYS, D], k_desc.layout)
    h_smem = reinterpret(kv_smem, sums_desc.dtype, [1, 1, D, D], sums_desc.layout)
    bar = new_barriers(1, 1)
    fence_async_shared()
    at = slot * gl.num_programs(0) + block
    mbarrier.expect(bar.index(0), 2 * 2 * KEYS * D)
    load_async(k_desc, [b, h, block * KEYS, 0], bar.index(0), kv_smem.index(0))
    load_async(v_desc, [b, h, block * KEYS, 0], bar.index(0), kv_smem.index(1))
    d = gl.arange(0, D, gl.SliceLayout(0, ACC))
    mean = gl.load(k_mean + bh * D + d)
    inside = block * KEYS + gl.arange(0, KEYS, gl.SliceLayout(1, ACC)) < tokens
    mbarrier.wait(bar.index(0), 0)

    k_tile = kv_smem.index(0).reshape([KEYS, D])
    v_tile = kv_smem.index(1).reshape([KEYS, D])
    phi = _phi(k_tile.load(ACC).to(gl.float32) - mean[None, :]) * (1.0 / KEYS)
    phi = gl.where(inside[:, None], phi, 0.0)
    k_tile.store(phi.to(k_desc.dtype))
    gl.store(sums + at.to(gl.int64) * ((D + 1) * D) + D * D + d, gl.sum(phi, 0).to(sums_desc.dtype))
    fence_async_shared()
    zeros = gl.zeros([D, D], gl.float32, ACC)
    h_t = warpgroup_mma(k_tile.permute([1, 0]), v_tile, zeros, use_acc=False, is_async=True)
    h_sum = warpgroup_mma_wait(0, [h_t])
    # every warp's products have read what is written now
    barrier()
    h_smem.reshape([D, D]).store(h_sum.to(sums_desc.dtype))
    fence_async_shared()
    store_async(sums_desc, [0, at, 0, 0], h_smem)
    # keeps the barrier's memory for itself: the first number of z_j, which lay there, was lost beside another process
    mbarrier.invalidate(bar.index(0))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["heads", "first_head", "tokens"])
def _hopper_linear_queries(
    q_desc, g_desc, out_desc, sums_desc, sums, ratio, row_delta, row_product, heads, first_head, tokens,
    ROWS: gl.constexpr,
):  # fmt: skip
    q_block = gl.program_id(0)
    slot = gl.program_id(1)
    bh = first_head + slot
    b = bh // heads
    h = bh % heads
    ACC: gl.constexpr = _sums(ROWS)
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [1, 1, ROWS, D], q_desc.layout)
    g_smem = gl.allocate_shared_memory(g_desc.dtype, [1, 1, ROWS, D], g_desc.layout)
    h_smem = gl.allocate_shared_memory(sums_desc.dtype, [1, 1, D, D], sums_desc.layout)
    sparse_smem = reinterpret(h_smem, out_desc.dtype, [1, 1, ROWS, D], out_desc.layout)
    bar = new_barriers(1, 1)
    fence_async_shared()
    at = slot * gl.num_programs(0) + q_block
    mbarrier.expect(bar.index(0), 2 * (2 * ROWS + D) * D)
    load_async(q_desc, [b, h, q_block * ROWS, 0], bar.index(0), q_smem)
    load_async(g_desc, [b, h, q_block * ROWS, 0], bar.index(0), g_smem)
    load_async(sums_desc, [0, at, 0, 0], bar.index(0), h_smem)
    rows = q_block * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, ACC))
    d = gl.arange(0, D, gl.SliceLayout(0, ACC))
    inside = rows < tokens
    row_at = bh.to(gl.int64) * tokens + rows
    row_ratio = gl.load(ratio + row_at, mask=inside, other=1.0)
    z_at = sums + at.to(gl.int64) * ((D + 1) * D) + D * D + d
    z_sum = gl.load(z_at).to(gl.float32)
    mbarrier.wait(bar.index(0), 0)

    q_tile = q_smem.reshape([ROWS, D])
    g_tile = g_smem.reshape([ROWS, D])
    h_tile = h_smem.reshape([D, D])
    zeros = gl.zeros([ROWS, D], gl.float32, ACC)
    dphi_t = warpgroup_mma(g_tile, h_tile.permute([1, 0]), zeros, use_acc=False, is_async=True)
    phi = _phi(q_tile.load(ACC).to(gl.float32))
    largest = gl.max(phi, 1)
    # as what O_l was made from, and out of the registers
    q_tile.store(phi.to(q_desc.dtype))
    norm = gl.sum(phi.to(q_desc.dtype).to(gl.float32) * z_sum[None, :], 1)
    weightless = norm < MIN_LINEAR_WEIGHT * largest
    inverse = gl.where(weightless, 0.0, 1.0 / norm)
    weight = (1.0 - row_ratio) * inverse
    dphi = warpgroup_mma_wait(0, [dphi_t])
    # every warp's products have read H: the softmax branch's dQ takes its place
    barrier()
    mbarrier.expect(bar.index(0), 2 * ROWS * D)
    load_async(out_desc, [b, h, q_block * ROWS, 0], bar.index(0), sparse_smem)
    phi = q_tile.load(ACC).to(gl.float32)
    product = gl.sum(phi * dphi, 1) * inverse
    # without weight O_l counts as O_s, and the ratio gets no gradient
    of_sparse = gl.load(row_delta + row_at, mask=inside, other=0.0)
    gl.store(row_product + row_at, gl.where(weightless, of_sparse, product), mask=inside)
    weighted = phi * weight[:, None]
    q_tile.store(weighted.to(q_desc.dtype))
    gl.store(z_at, -gl.sum(weighted * product[:, None], 0).to(sums_desc.dtype))
    dq = weighted * (dphi - product[:, None] * z_sum[None, :])
    mbarrier.wait(bar.index(0), 1)
    dq = (dq + sparse_smem.reshape([ROWS, D]).load(ACC).to(gl.float32)).to(q_desc.dtype)
    fence_async_shared()
    zeros = gl.zeros([D, D], gl.float32, ACC)
    dh_t = warpgroup_mma(q_tile.permute([1, 0]), g_tile, zeros, use_acc=False, is_async=True)
    dh = warpgroup_mma_wait(0, [dh_t])
    # every warp's products have read what is written now
    barrier()
    h_tile.store(dh.to(sums_desc.dtype))
    q_tile.store(dq)
    fence_async_shared()
    store_async(sums_desc, [0, at, 0, 0], h_smem)
    store_async(out_desc, [b, h, q_block * ROWS, 0], q_smem)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["heads", "first_head", "tokens"])
def _hopper_linear_keys(
    k_desc, v_desc, gk_desc, gv_desc, sums_desc, k_mean, sums, tile_totals, heads, first_head, tokens, factor
):
    block = gl.program_id(0)
    slot = gl.program_id(1)
    bh = first_head + slot
    b = bh // heads
    h = bh % heads
    ACC: gl.constexpr = _sums(KEYS)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [1, 1, KEYS, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [1, 1, KEYS, D], v_desc.layout)
    h_smem = gl.allocate_shared_memory(sums_desc.dtype, [1, 1, D, D], sums_desc.layout)
    bar = new_barriers(1, 1)
    fence_async_shared()
    at = slot * gl.num_programs(0) + block
    mbarrier.expect(bar.index(0), 2 * (2 * KEYS + D) * D)
    load_async(k_desc, [b, h, block * KEYS, 0], bar.index(0), k_smem)
    load_async(v_desc, [b, h, block * KEYS, 0], bar.index(0), v_smem)
    load_async(sums_desc, [0, at, 0, 0], bar.index(0), h_smem)
    d = gl.arange(0, D, gl.SliceLayout(0, ACC))
    mean = gl.load(k_mean + bh * D + d)
    dz = gl.load(sums + at.to(gl.int64) * ((D + 1) * D) + D * D + d).to(gl.float32)
    inside = block * KEYS + gl.arange(0, KEYS, gl.SliceLayout(1, ACC)) < tokens
    mbarrier.wait(bar.index(0), 0)

    k_tile = k_smem.reshape([KEYS, D])
    v_tile = v_smem.reshape([KEYS, D])
    dh = h_smem.reshape([D, D])
    zeros = gl.zeros([KEYS, D], gl.float32, ACC)
    phi = _phi(k_tile.load(ACC).to(gl.float32) - mean[None, :])
    phi = gl.where(inside[:, None], phi, 0.0)
    phi_low = gl.convert_layout(phi.to(k_desc.dtype), gl.DotOperandLayout(0, ACC, 2))
    dv_t = warpgroup_mma(phi_low, dh, zeros, use_acc=False, is_async=True)
    dv = warpgroup_mma_wait(0, [dv_t])
    keep(phi_low, 16)
    k_tile.store((factor * dv).to(v_desc.dtype))
    dphi_t = warpgroup_mma(v_tile, dh.permute([1, 0]), zeros, use_acc=False, is_async=True)
    dphi = warpgroup_mma_wait(0, [dphi_t]) + dz[None, :]
    # softmax's gradient: the projection on phi goes
    dk = factor * phi * (dphi - gl.sum(phi * dphi, 1)[:, None])
    gl.store(tile_totals + (bh.to(gl.int64) * gl.num_programs(0) + block) * D + d, gl.sum(dk, 0))
    # every warp's products have read what is written now
    barrier()
    v_tile.store(dk.to(k_desc.dtype))
    fence_async_shared()
    store_async(gk_desc, [b, h, block * KEYS, 0], v_smem)
    store_async(gv_desc, [b, h, block * KEYS, 0], k_smem)
    tma.store_wait(0)


def _descriptor(tensor, rows):
    """TMA descriptor of a (B, H, N, D) tensor, any 16-byte strides, in tiles of ``rows`` rows."""
    return TensorDescriptor.from_tensor(tensor, [1, 1, rows, HEAD_DIM], gl.NVMMASharedLayout(128, 16, rank=4))


def _squares(sums):
    """TMA descriptor of the D x D part of (G, T, (D + 1) * D) sums."""
    return _descriptor(sums[:, :, : HEAD_DIM * HEAD_DIM].view(1, -1, HEAD_DIM, HEAD_DIM), HEAD_DIM)


def hopper_linear_sums(k, v, k_mean, sums, group):
    """Fills sums (G, T_n, (D + 1) * D) with h_j and z_j as pack() of pack.py does, for bfloat16 tensors that TMA can copy."""
    heads, tokens = k.shape[1:3]
    launch(
        _hopper_linear_sums, (block_count(tokens, K_BLOCK), group.stop - group.start),
        *(_descriptor(x, K_BLOCK) for x in (k, v)), _squares(sums), k_mean, sums, heads, group.start, tokens,
        options={"num_warps": 4},
    )  # fmt: skip


def hopper_linear_queries(q, grad_out, grad_q, query_sums, ratio, row_delta, row_product, group, *, query_block):
    """As linear_queries() of backward_linear.py, for bfloat16 tensors that TMA can copy."""
    heads, tokens = q.shape[1:3]
    launch(
        _hopper_linear_queries, (query_sums.shape[1], group.stop - group.start),
        *(_descriptor(x, query_block) for x in (q, grad_out, grad_q)), _squares(query_sums),
        query_sums, ratio, row_delta, row_product, heads, group.start, tokens,
        ROWS=query_block, options={"num_warps": query_block // 16},
    )  # fmt: skip


def hopper_linear_keys(k, v, k_mean, grad_k, grad_v, sums, tile_totals, group, *, factor):
    """As linear_keys() of backward_linear.py, for bfloat16 tensors that TMA can copy. A tile is one key block."""
    heads, tokens = k.shape[1:3]
    launch(
        _hopper_linear_keys, (block_count(tokens, K_BLOCK), group.stop - group.start),
        *(_descriptor(x, K_BLOCK) for x in (k, v, grad_k, grad_v)), _squares(sums), k_mean, sums, tile_totals,
        heads, group.start, tokens, factor, options={"num_warps": 4},
    )  # fmt: skip
