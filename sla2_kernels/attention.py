"""sla2_attention(): check the arguments, route, run a backend. One torch operator, so torch.compile sees no graph break."""

import math
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from . import router, torch_backend, torch_backward
from .router import (
    K_BLOCK,
    Q_BLOCK,
    block_count,
    resample_ratio,
    resample_ratio_gradient,
    selected_block_count,
)
from .support import BACKENDS, PRECISIONS, resolve_backend

LAYOUTS = ("BHND", "BNHD")


def sla2_attention(
    q,
    k,
    v,
    proj_q=None,
    proj_k=None,
    alpha=None,
    *,
    sparsity=0.97,
    precision="int8",
    layout="BHND",
    scale=None,
    key_blocks=None,
    backend="auto",
    return_alpha=False,
    keep_diagonal=False,
):
    """Sparse-linear attention with a learned router (SLA2, arXiv 2602.12675, Eq. 13-16).

    Softmax attention over the top-k key blocks that the router picks for each query block, linear attention over the
    rest, mixed by alpha. Query blocks have 128 tokens, key blocks 64; any token count works.

    Args:
        q: (B, H, N, D), or (B, N, H, D) with layout "BNHD"; a view of any stride. float16, bfloat16 or float32
            (float64 on the torch backend).
        k, v: (B, H, M, D) or (B, M, H, D); q's dtype and device.
        proj_q, proj_k: router projections, (D, D) or (H, D, D), applied as x @ W^T; None is the identity.
        alpha: share of the softmax branch, in (0, 1): (H,), or (H, A) knots resampled linearly along the query blocks.
            None estimates it per query row from the run.
        sparsity: share of key blocks that the softmax branch skips, 0 <= sparsity < 1. Ignored with ``key_blocks``.
        precision: "16bit" (the dtype of q), "int8" (INT8 QK^T, FP8 PV; 16-bit PV below sm_89) or "fp8" (sm_89 and up).
        layout: "BHND" or "BNHD".
        scale: softmax scale, > 0; None is D ** -0.5.
        key_blocks: integers (B, H, T_m, n), distinct key blocks per query block, instead of routing. Contents are
            checked on the CPU only. On a GPU, where a check would wait for it, what is out of range is clamped and a
            block named twice counts once: the next one takes the second place.
        backend: "triton", "torch", or "auto": Triton where it can run, else torch.
        return_alpha: also return the ratio used for each query row.
        keep_diagonal: each query block always takes the key blocks that hold its own tokens, within its count; needs as
            many keys as queries. Ignored with ``key_blocks``.

    Returns:
        The output, contiguous, in q's layout and dtype; with ``return_alpha`` also float32 (B, H, N).

    Raises:
        ValueError: an argument does not fit; the sentence says which and what is expected.
    """
    _check(q, k, v, sparsity, precision, layout, scale, backend)
    heads_first = layout == "BHND"
    batch, heads, tokens, head_dim = q.shape if heads_first else q.transpose(1, 2).shape
    query_blocks = block_count(tokens, Q_BLOCK)
    key_block_count = block_count(k.shape[2 if heads_first else 1], K_BLOCK)
    _check_weights(proj_q, proj_k, alpha, heads, head_dim)
    if key_blocks is not None:
        _check_key_blocks(key_blocks, (batch, heads, query_blocks), key_block_count, q.device)
    elif keep_diagonal:
        _check_diagonal(q, k)
    diagonal = 0 if keep_diagonal else None
    scale = head_dim**-0.5 if scale is None else float(scale)
    out, row_ratio, _ = torch.ops.sla2.attention(
        q, k, v, proj_q, proj_k, alpha, key_blocks, float(sparsity), precision, heads_first, scale, backend, diagonal
    )
    return (out, row_ratio) if return_alpha else out


def select_key_blocks(q, k, proj_q=None, proj_k=None, *, sparsity, layout="BHND", backend="auto", keep_diagonal=False):
    """The key blocks that the router picks, int32 (B, H, T_m, n), ascending, n = max(1, floor((1 - sparsity) * T_n)).

    Arguments as in :func:`sla2_attention`. Scores have the precision of float32; of equal scores the lowest index wins.
    """
    if keep_diagonal:
        _check_diagonal(q, k)
    return select_blocks(q, k, proj_q, proj_k, sparsity, layout, backend, 0 if keep_diagonal else None)


def select_blocks(q, k, proj_q, proj_k, sparsity, layout, backend, diagonal):
    """select_key_blocks(), where ``diagonal`` is the place among the keys of the first query's own key, or None."""
    _check(q, k, k, sparsity, "16bit", layout, None, backend)
    if layout == "BNHD":
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    _check_weights(proj_q, proj_k, None, q.shape[1], q.shape[3])
    backend = resolve_backend(backend, q.device, q.dtype, q.shape[3], "16bit")
    return _route(q, k, proj_q, proj_k, sparsity, backend, diagonal)


def _route(q, k, proj_q, proj_k, sparsity, backend, diagonal):
    count = selected_block_count(sparsity, block_count(k.shape[2], K_BLOCK))
    if backend == "triton":
        from . import triton_backend

        return triton_backend.route(q, k, proj_q, proj_k, count, diagonal)
    scores = router.router_scores(q, k, proj_q, proj_k)
    return router.top_k_blocks(scores if diagonal is None else router.with_diagonal(scores, diagonal), count)


@torch.library.custom_op("sla2::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    proj_q: Optional[Tensor],
    proj_k: Optional[Tensor],
    alpha: Optional[Tensor],
    key_blocks: Optional[Tensor],
    sparsity: float,
    precision: str,
    heads_first: bool,
    scale: float,
    backend: str,
    diagonal: Optional[int] = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, ratio per query row, key blocks used); see sla2_attention."""
    # in here, where torch.compile does not look: some releases cannot trace a search for packages
    backend = resolve_backend(backend, q.device, q.dtype, q.shape[3], precision)
    if not heads_first:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not heads_first:
        out = torch.empty(_swapped(q.shape), dtype=q.dtype, device=q.device).transpose(1, 2)
    ratios = _ratios_of(alpha, q)
    if key_blocks is not None:
        key_blocks = _distinct(key_blocks.to(torch.int32), block_count(k.shape[2], K_BLOCK))
    if backend == "triton":
        from . import triton_backend

        row_ratio, key_blocks = triton_backend.attention(
            q, k, v, proj_q, proj_k, key_blocks, ratios, out,
            sparsity=sparsity, scale=scale, precision=precision, diagonal=diagonal,
        )  # fmt: skip
    else:
        if key_blocks is None:
            key_blocks = _route(q, k, proj_q, proj_k, sparsity, backend, diagonal)
        result, row_ratio = torch_backend.attention(q, k, v, key_blocks, ratios, scale=scale, precision=precision)
        out.copy_(result)
    return out if heads_first else out.transpose(1, 2), row_ratio.float(), key_blocks


def _ratios_of(alpha, q):
    """alpha as one ratio per query block of q (B, H, N, D), (H, T_m) on q's device; None stays None."""
    if alpha is None:
        return None
    return resample_ratio(alpha.to(q.device, torch_backend.compute_dtype(q)), block_count(q.shape[2], Q_BLOCK))


def _distinct(key_blocks, count):
    """Ascending rows of distinct indices in 0 to count - 1; those of a sound selection are only sorted. Never waits for a GPU.

    A repeat becomes the next index up; where that would leave the range, the last indices are taken.
    """
    steps = torch.arange(key_blocks.shape[-1], dtype=key_blocks.dtype, device=key_blocks.device)
    ordered = key_blocks.clamp(0, count - 1).sort(dim=-1).values
    return ((ordered - steps).cummax(dim=-1).values + steps).minimum(steps + (count - len(steps)))


def _swapped(shape):
    return shape[0], shape[2], shape[1], shape[3]


@_attention.register_fake
def _(q, k, v, proj_q, proj_k, alpha, key_blocks, sparsity, precision, heads_first, scale, backend, diagonal=None):
    batch, heads, tokens, _ = q.shape if heads_first else _swapped(q.shape)
    keys = k.shape[2 if heads_first else 1]
    if key_blocks is None:
        count = selected_block_count(sparsity, block_count(keys, K_BLOCK))
    else:
        count = key_blocks.shape[-1]
    return (
        q.new_empty(q.shape),
        q.new_empty((batch, heads, tokens), dtype=torch.float32),
        q.new_empty((batch, heads, block_count(tokens, Q_BLOCK), count), dtype=torch.int32),
    )


def _save_for_backward(ctx, inputs, output):
    q, k, v, _, _, alpha, _, _, precision, heads_first, scale, backend, _ = inputs
    ctx.save_for_backward(q, k, v, alpha, output[1], output[2])
    ctx.precision, ctx.heads_first, ctx.scale, ctx.backend = precision, heads_first, scale, backend


def _backward(ctx, grad_out, grad_row_ratio, grad_blocks):
    """Gradients on the saved selection: 16-bit in Triton; in torch those of its own formats, recomputed chunk by chunk."""
    q, k, v, alpha, row_ratio, key_blocks = ctx.saved_tensors
    *grads, grad_ratio = torch.ops.sla2.attention_backward(
        grad_out, q, k, v, key_blocks, row_ratio, ctx.heads_first, ctx.scale, alpha, ctx.precision, ctx.backend
    )
    grad_alpha = None
    if alpha is not None:
        blocks = block_count(k.shape[2 if ctx.heads_first else 1], K_BLOCK)
        # with every key block selected the ratio is 1, whatever alpha says; so it is in rows whose linear branch has no weight
        if grad_row_ratio is not None and key_blocks.shape[-1] < blocks:
            rows = F.pad(grad_row_ratio.where(row_ratio < 1, 0.0), (0, -row_ratio.shape[-1] % Q_BLOCK))
            grad_ratio = grad_ratio + rows.unflatten(-1, (-1, Q_BLOCK)).sum(dim=(0, -1))
        grad_alpha = resample_ratio_gradient(grad_ratio, alpha.shape).to(alpha)
    return *grads, None, None, grad_alpha, *[None] * 7


@torch.library.custom_op("sla2::attention_backward", mutates_args=())
def _attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_blocks: Tensor,
    row_ratio: Tensor,
    heads_first: bool,
    scale: float,
    alpha: Optional[Tensor] = None,
    precision: str = "16bit",
    backend: str = "triton",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, d loss / d ratio (H, T_m) float32, float64 for float64 inputs)."""
    backend = resolve_backend(backend, q.device, q.dtype, q.shape[3], precision)
    tensors = (grad_out.to(q.dtype), q, k, v)
    grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v)]
    if not heads_first:
        tensors, views = [t.transpose(1, 2) for t in tensors], [t.transpose(1, 2) for t in grads]
    else:
        views = grads
    grad_out, q, k, v = tensors
    if backend == "triton":
        from . import triton_backward

        grad_ratio = triton_backward.attention_backward(q, k, v, grad_out, key_blocks, row_ratio, *views, scale=scale)
    else:
        ratios = _ratios_of(alpha, q)
        grad_ratio = torch_backward.attention_backward(
            q, k, v, grad_out, key_blocks, ratios, *views, scale=scale, precision=precision
        )
    return *grads, grad_ratio.sum(dim=0)


@_attention_backward.register_fake
def _(grad_out, q, k, v, key_blocks, row_ratio, heads_first, scale, alpha=None, precision="16bit", backend="triton"):
    grads = (t.new_empty(t.shape) for t in (q, k, v))
    dtype = torch_backend.compute_dtype(q)
    return *grads, q.new_empty((key_blocks.shape[1], key_blocks.shape[2]), dtype=dtype)


_attention.register_autograd(_backward, setup_context=_save_for_backward)


def _check(q, k, v, sparsity, precision, layout, scale, backend):
    if layout not in LAYOUTS:
        raise ValueError(f'layout must be "BHND" or "BNHD", got {layout!r}.')
    if precision not in PRECISIONS:
        raise ValueError(f'precision must be "16bit", "int8" or "fp8", got {precision!r}.')
    if backend not in BACKENDS:
        raise ValueError(f'backend must be "auto", "triton" or "torch", got {backend!r}.')
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be at least 0 and below 1, got {sparsity}.")
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be a finite number above 0, got {scale}.")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions ({layout}), got shape {tuple(tensor.shape)}.")
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"q, k and v must share one dtype and device; q is {q.dtype} on {q.device}, {name} is {tensor.dtype} on {tensor.device}."
            )
        if 0 in tensor.shape:
            raise ValueError(f"{name} is empty: shape {tuple(tensor.shape)}.")
    if not q.dtype.is_floating_point or q.dtype.itemsize < 2:
        raise ValueError(f"q, k and v must be float16, bfloat16, float32 or float64, got {q.dtype}.")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}.")
    heads = HEADS_DIM[layout]
    if (q.shape[0], q.shape[heads], q.shape[3]) != (k.shape[0], k.shape[heads], k.shape[3]):
        raise ValueError(
            f"q and k must agree in batch, heads and head_dim ({layout}), got {tuple(q.shape)} and {tuple(k.shape)}."
        )


HEADS_DIM = {"BHND": 1, "BNHD": 2}


def _check_diagonal(q, k):
    if q.shape != k.shape:
        raise ValueError(f"keep_diagonal needs as many keys as queries, got {tuple(k.shape)} and {tuple(q.shape)}.")


def _check_weights(proj_q, proj_k, alpha, heads, head_dim):
    for name, proj in (("proj_q", proj_q), ("proj_k", proj_k)):
        if proj is not None and tuple(proj.shape) not in ((head_dim, head_dim), (heads, head_dim, head_dim)):
            raise ValueError(
                f"{name} must be ({head_dim}, {head_dim}) or ({heads}, {head_dim}, {head_dim}), got {tuple(proj.shape)}."
            )
    if alpha is not None and (alpha.dim() not in (1, 2) or alpha.shape[0] != heads or alpha.numel() == 0):
        raise ValueError(f"alpha must be ({heads},) or ({heads}, knots), got {tuple(alpha.shape)}.")


def _check_key_blocks(key_blocks, rows, key_block_count, device):
    if key_blocks.device != device:
        raise ValueError(f"key_blocks must lie on q's device {device}, got {key_blocks.device}.")
    if key_blocks.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"key_blocks must be int32 or int64, got {key_blocks.dtype}.")
    if key_blocks.dim() != 4 or tuple(key_blocks.shape[:3]) != rows or not 1 <= key_blocks.shape[3] <= key_block_count:
        raise ValueError(
            f"key_blocks must be {rows} x n with n from 1 to {key_block_count}, got {tuple(key_blocks.shape)}."
        )
    if key_blocks.device.type == "cpu" and not torch.compiler.is_compiling():
        ordered = key_blocks.sort(dim=-1).values
        if ordered[..., 0].min() < 0 or ordered[..., -1].max() >= key_block_count:
            raise ValueError(f"key_blocks must lie in 0 to {key_block_count - 1}.")
        if (ordered[..., 1:] == ordered[..., :-1]).any():
            raise ValueError("key_blocks must not name a key block twice for one query block.")
