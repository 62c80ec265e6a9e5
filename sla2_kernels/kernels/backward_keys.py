"""dK and dV of the sparse branch, added to what the linear branch left there, and the way back through smooth-k.

One program per (key tile, head) walks the query blocks that selected its key block, in ascending order, from a list:
no atomics, so repeats are bitwise equal. Softmax does not see K's mean, so only the linear branch's dK loses its own mean.
The channels are taken in two halves: with no more channels than keys Triton gives every warp whole rows, so that P stays in
registers, and two programs fit 100 KB of shared memory.
"""

import torch
import triton
import triton.language as tl

from ..router import block_count
from .launch import launch
from .planes import KEY_BLOCK, load_tile, plane_of, store_tile, tile_rows

NO_ROW = tl.constexpr(1.0e30)  # the log-sum-exp of a row past the end: its P is exp2(-1e30) = 0


def selecting_blocks(selected, key_blocks):
    """The transposed selection: which query blocks selected each key block.

    Args:
        selected: int32 (B * H, T_m, n), distinct key blocks per query block.

    Returns:
        query_blocks: int32 (B * H, T_m * n), ordered by key block, ascending within one.
        starts: int32 (B * H, T_n + 1): key block j's list is query_blocks[:, starts[j] : starts[j + 1]].
    """
    rows, count = selected.shape[1:]
    query_block = torch.arange(rows, dtype=torch.int64, device=selected.device)[:, None]
    # one number per pair, all distinct, so that sorting needs no stability
    pairs = (selected.long() * rows + query_block).flatten(1).sort(dim=1).values
    bounds = torch.arange(key_blocks + 1, dtype=torch.int64, device=selected.device) * rows
    starts = torch.searchsorted(pairs, bounds.expand(len(pairs), -1).contiguous())
    return (pairs % rows).to(torch.int32), starts.to(torch.int32)


@triton.jit
def _finish(gk_plane, gv_plane, dk, dv, k_correction, bh, keys, d, grad_stride_n, k_tokens, scale, D: tl.constexpr):
    """Writes dk and dv, of channels d, with the linear branch's share added."""
    dk *= scale
    if k_correction is not None:
        of_linear = load_tile(gk_plane, keys, d, grad_stride_n, 1, k_tokens).to(tl.float32)
        dk += of_linear - tl.load(k_correction + bh * D + d)[None, :]
        dv += load_tile(gv_plane, keys, d, grad_stride_n, 1, k_tokens).to(tl.float32)
    store_tile(gk_plane, keys, d, grad_stride_n, 1, k_tokens, dk)
    store_tile(gv_plane, keys, d, grad_stride_n, 1, k_tokens, dv)


@triton.jit(do_not_specialize=["heads", "q_tokens", "k_tokens", "pairs"])
def _key_gradient(
    q, k, v, grad_out, grad_k, grad_v, query_blocks, starts, row_shift, row_delta, k_correction,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d, g_stride_b, g_stride_h, g_stride_n, g_stride_d,
    grad_stride_h, grad_stride_n, heads, q_tokens, k_tokens, pairs, scale_log2, scale,
    D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, QUERY_BLOCK: tl.constexpr,
):  # fmt: skip
    tile, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    HALF: tl.constexpr = D // 2
    keys, low = tile_rows(tile, KEYS), tl.arange(0, HALF)
    high = HALF + low
    k_plane = plane_of(k, bh, heads, k_stride_b, k_stride_h)
    k_low = load_tile(k_plane, keys, low, k_stride_n, k_stride_d, k_tokens)
    k_high = load_tile(k_plane, keys, high, k_stride_n, k_stride_d, k_tokens)
    v_plane = plane_of(v, bh, heads, v_stride_b, v_stride_h)
    v_low = load_tile(v_plane, keys, low, v_stride_n, v_stride_d, k_tokens)
    v_high = load_tile(v_plane, keys, high, v_stride_n, v_stride_d, k_tokens)
    q_plane = plane_of(q, bh, heads, q_stride_b, q_stride_h)
    g_plane = plane_of(grad_out, bh, heads, g_stride_b, g_stride_h)
    row_shift += bh * q_tokens
    row_delta += bh * q_tokens
    query_blocks += bh * pairs
    starts += bh * (tl.cdiv(k_tokens, KEY_BLOCK) + 1) + tile * KEYS // KEY_BLOCK
    first, end = tl.load(starts), tl.load(starts + 1)

    dk_low, dk_high = tl.zeros([KEYS, HALF], dtype=tl.float32), tl.zeros([KEYS, HALF], dtype=tl.float32)
    dv_low, dv_high = tl.zeros([KEYS, HALF], dtype=tl.float32), tl.zeros([KEYS, HALF], dtype=tl.float32)
    for step in range(first * (QUERY_BLOCK // ROWS), end * (QUERY_BLOCK // ROWS)):
        i = tl.load(query_blocks + step // (QUERY_BLOCK // ROWS)).to(tl.int64)
        rows = i * QUERY_BLOCK + step % (QUERY_BLOCK // ROWS) * ROWS + tl.arange(0, ROWS)
        q_low = load_tile(q_plane, rows, low, q_stride_n, q_stride_d, q_tokens)  # [ROWS, HALF]
        q_high = load_tile(q_plane, rows, high, q_stride_n, q_stride_d, q_tokens)  # [ROWS, HALF]
        g_low = load_tile(g_plane, rows, low, g_stride_n, g_stride_d, q_tokens)  # [ROWS, HALF]
        g_high = load_tile(g_plane, rows, high, g_stride_n, g_stride_d, q_tokens)  # [ROWS, HALF]
        shift = tl.load(row_shift + rows, mask=rows < q_tokens, other=NO_ROW)  # [ROWS]
        delta = tl.load(row_delta + rows, mask=rows < q_tokens, other=0.0)  # [ROWS]
        scores = tl.dot(k_low, tl.trans(q_low), input_precision="tf32x3")
        scores = tl.dot(k_high, tl.trans(q_high), scores, input_precision="tf32x3")  # [KEYS, ROWS]
        p = tl.exp2(scores * scale_log2 - shift[None, :])
        p_rounded = p.to(g_low.dtype)
        dv_low = tl.dot(p_rounded, g_low, dv_low, input_precision="tf32x3")  # [KEYS, HALF]
        dv_high = tl.dot(p_rounded, g_high, dv_high, input_precision="tf32x3")
        dp = tl.dot(v_low, tl.trans(g_low), input_precision="tf32x3")
        dp = tl.dot(v_high, tl.trans(g_high), dp, input_precision="tf32x3")  # [KEYS, ROWS]
        ds = (p * (dp - delta[None, :])).to(q_low.dtype)
        dk_low = tl.dot(ds, q_low, dk_low, input_precision="tf32x3")  # [KEYS, HALF]
        dk_high = tl.dot(ds, q_high, dk_high, input_precision="tf32x3")

    grad_stride_b = heads.to(tl.int64) * k_tokens * D
    gk_plane = plane_of(grad_k, bh, heads, grad_stride_b, grad_stride_h)
    gv_plane = plane_of(grad_v, bh, heads, grad_stride_b, grad_stride_h)
    _finish(gk_plane, gv_plane, dk_low, dv_low, k_correction, bh, keys, low, grad_stride_n, k_tokens, scale, D)
    _finish(gk_plane, gv_plane, dk_high, dv_high, k_correction, bh, keys, high, grad_stride_n, k_tokens, scale, D)


def key_gradients(
    q, k, v, grad_out, grad_k, grad_v, transposed, row_shift, row_delta, k_correction,
    *, scale, scale_log2, query_block, config,
):  # fmt: skip
    """grad_k and grad_v (B, H, M, D), contiguous or views of contiguous (B, M, H, D): the sparse branch's share.

    transposed: what selecting_blocks() returns. k_correction: float32 (B * H, D), the mean over tokens of the linear
    branch's dK, whose dK and dV grad_k and grad_v hold then; None where there is no linear branch.
    """
    batch, heads, tokens, head_dim = k.shape
    query_blocks, starts = transposed
    launch(
        _key_gradient, (block_count(tokens, config.keys), batch * heads),
        q, k, v, grad_out, grad_k, grad_v, query_blocks, starts, row_shift, row_delta, k_correction,
        *q.stride(), *k.stride(), *v.stride(), *grad_out.stride(), *grad_k.stride()[1:3],
        heads, q.shape[2], tokens, query_blocks.shape[1], scale_log2, scale,
        D=head_dim, ROWS=config.rows, KEYS=config.keys, QUERY_BLOCK=query_block, options=config.options,
    )  # fmt: skip
