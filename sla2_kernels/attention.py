"""sla2_attention(): check the arguments, route, run a backend. One torch operator, so torch.compile sees no graph break."""

from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from . import loops, router, torch_backend, torch_backward
from .arguments import (
    HEADS_DIM,
    TOKENS_DIM,
    check_alpha,
    check_diagonal,
    check_inputs,
    check_key_blocks,
    check_options,
    check_projections,
    checked_scale,
    checked_sparsity,
    refuse_forward_mode,
)
from .router import (
    K_BLOCK,
    Q_BLOCK,
    block_count,
    resample_ratio,
    resample_ratio_gradient,
    selected_block_count,
)
from .support import resolve_backend, triton_reason


class RoutedBlocks(NamedTuple):
    """A selection that this package's own router made, for ``key_blocks``: as it ascends and holds no block twice, it is
    neither checked nor sorted."""

    key_blocks: Tensor


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
    linear_branch=True,
):
    """Sparse-linear attention with a learned router (SLA2, arXiv 2602.12675, Eq. 13-16).

    Softmax attention over the top-k key blocks that the router picks for each query block, linear attention over the
    rest, mixed by alpha. Query blocks have 128 tokens, key blocks 64; any token count works.

    Args:
        q: (B, H, N, D), or (B, N, H, D) with layout "BNHD"; a view of any stride. float16, bfloat16 or float32
            (float64 on the torch backend).
        k, v: (B, H, M, D) or (B, M, H, D); q's dtype and device.
        proj_q, proj_k: router projections, (D, D) or (H, D, D), finite, applied as x @ W^T; None is the identity.
        alpha: share of the softmax branch, 0 to 1: (H,), or (H, A) knots resampled linearly along the query blocks.
            None estimates it per query row from the run.
        sparsity: share of key blocks that the softmax branch skips, 0 <= sparsity < 1. Ignored with ``key_blocks``.
        precision: "16bit" (the dtype of q), "int8" (INT8 QK^T; PV in INT8 on RTX cards and A100, in FP8 on Hopper and B200) or "fp8" (sm_89 and up).
        layout: "BHND" or "BNHD".
        scale: softmax scale, > 0; None is D ** -0.5.
        key_blocks: integers (B, H, T_m, n), distinct key blocks per query block, instead of routing. On a GPU what is out
            of range is clamped and a block named twice counts once: the next one takes the second place.
        backend: "triton", "torch", or "auto": Triton where it can run, else torch.
        return_alpha: also return the ratio used for each query row.
        keep_diagonal: each query block always takes the key blocks that hold its own tokens, within its count; needs as
            many keys as queries. Ignored with ``key_blocks``.
        linear_branch: False leaves the linear branch out, at no cost: the output is softmax attention over the selected
            key blocks alone, the ratio 1. Takes no alpha.

    Contents of proj_q, proj_k, alpha and key_blocks are checked on the CPU only, and not under torch.compile: on a GPU a
    check would wait for it.

    Returns:
        The output, contiguous, in q's layout and dtype; with ``return_alpha`` also float32 (B, H, N).

    Raises:
        ValueError: an argument does not fit; the sentence says which and what is expected.
        NotImplementedError: q, k, v or alpha carries a tangent of forward-mode differentiation.
    """
    check_options(layout, backend, precision)
    check_inputs(layout, q=q, k=k, v=v)
    batch, heads, tokens, head_dim = q.shape if layout == "BHND" else _swapped(q.shape)
    check_projections(proj_q, proj_k, heads, head_dim)
    check_alpha(alpha, heads)
    if alpha is not None and not linear_branch:
        raise ValueError("alpha mixes the linear branch in: leave it out where linear_branch is False.")
    is_routed = isinstance(key_blocks, RoutedBlocks)
    if is_routed:
        key_blocks, sparsity = key_blocks.key_blocks, 0.0
    elif key_blocks is not None:
        rows = batch, heads, block_count(tokens, Q_BLOCK)
        check_key_blocks(key_blocks, rows, block_count(k.shape[TOKENS_DIM[layout]], K_BLOCK), q.device)
        sparsity = 0.0
    elif keep_diagonal:
        check_diagonal(q, k)
    refuse_forward_mode(q, k, v, alpha)
    out, row_ratio, _ = torch.ops.sla2.attention(
        q, k, v, proj_q, proj_k, alpha, key_blocks, checked_sparsity(sparsity), precision, layout == "BHND",
        checked_scale(scale, head_dim), backend, 0 if keep_diagonal else None, bool(linear_branch), is_routed,
    )  # fmt: skip
    return (out, row_ratio) if return_alpha else out


def select_key_blocks(q, k, proj_q=None, proj_k=None, *, sparsity, layout="BHND", backend="auto", keep_diagonal=False):
    """The key blocks that the router picks, int32 (B, H, T_m, n), ascending, n = max(1, floor((1 - sparsity) * T_n)).

    Arguments as in :func:`sla2_attention`. Scores have the precision of float32; of equal scores the lowest index wins.
    """
    check_selection(q, k, proj_q, proj_k, layout, backend)
    if keep_diagonal:
        check_diagonal(q, k)
    if layout == "BNHD":
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    return select_blocks(q, k, proj_q, proj_k, checked_sparsity(sparsity), backend, 0 if keep_diagonal else None)


def check_selection(q, k, proj_q, proj_k, layout, backend):
    """What a selection refuses of its tensors; see arguments.py."""
    check_options(layout, backend)
    check_inputs(layout, q=q, k=k)
    check_projections(proj_q, proj_k, q.shape[HEADS_DIM[layout]], q.shape[3])


def select_blocks(q, k, proj_q, proj_k, sparsity, backend, diagonal):
    """select_key_blocks() of checked BHND views; diagonal: the place among the keys of the first query's own key, or None."""
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
    linear_branch: bool = True,
    is_routed: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, ratio per query row, key blocks used, in one dimension); see sla2_attention. is_routed: they were RoutedBlocks."""
    # in here, where torch.compile does not look: some releases cannot trace a search for packages
    backend = resolve_backend(backend, q.device, q.dtype, q.shape[3], precision)
    # what is returned must not be a view, or a caller could not write into it under autograd
    result = out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not heads_first:
        q, k, v, out = (t.transpose(1, 2) for t in (q, k, v, out))
    ratios = _ratios_of(alpha, q)
    if is_routed:
        key_blocks = key_blocks.clone()  # an operator must not return its own input
    elif key_blocks is not None:
        key_blocks = _distinct(key_blocks, block_count(k.shape[2], K_BLOCK))
    if backend == "triton":
        from . import triton_backend

        row_ratio, key_blocks = triton_backend.attention(
            q, k, v, proj_q, proj_k, key_blocks, ratios, out,
            sparsity=sparsity, scale=scale, precision=precision, diagonal=diagonal, linear_branch=linear_branch,
        )  # fmt: skip
    else:
        if key_blocks is None:
            key_blocks = _route(q, k, proj_q, proj_k, sparsity, backend, diagonal)
        reason = triton_reason(q.device, q.dtype, q.shape[3], precision)
        loops.took_loop(loops.TORCH, reason or 'backend "torch" was asked for')
        row_ratio = torch_backend.attention(
            q, k, v, key_blocks, ratios, out, scale=scale, precision=precision, linear_branch=linear_branch
        )
    return result, row_ratio.float(), key_blocks.flatten()


def _ratios_of(alpha, q):
    """alpha as one ratio per query block of q (B, H, N, D), (H, T_m) on q's device; None stays None."""
    if alpha is None:
        return None
    return resample_ratio(alpha.to(q.device, torch_backend.compute_dtype(q)), block_count(q.shape[2], Q_BLOCK))


def _distinct(key_blocks, count):
    """Ascending int32 rows of distinct indices in 0 to count - 1; those of a sound selection are only sorted.

    A repeat becomes the next index up; where that would leave the range, the last indices are taken. Never waits for a GPU.
    """
    steps = torch.arange(key_blocks.shape[-1], dtype=torch.int32, device=key_blocks.device)
    # clamped first: in 32 bits what does not fit would wrap into the range
    ordered = key_blocks.clamp(0, count - 1).to(torch.int32).sort(dim=-1).values
    return ((ordered - steps).cummax(dim=-1).values + steps).minimum(steps + (count - len(steps)))


def _swapped(shape):
    return shape[0], shape[2], shape[1], shape[3]


@_attention.register_fake
def _(
    q, k, v, proj_q, proj_k, alpha, key_blocks, sparsity, precision, heads_first, scale, backend, diagonal=None,
    linear_branch=True, is_routed=False,
):  # fmt: skip
    batch, heads, tokens, _ = q.shape if heads_first else _swapped(q.shape)
    keys = k.shape[2 if heads_first else 1]
    if key_blocks is None:
        count = selected_block_count(sparsity, block_count(keys, K_BLOCK))
    else:
        count = key_blocks.shape[-1]
    return (
        q.new_empty(q.shape),
        q.new_empty((batch, heads, tokens), dtype=torch.float32),
        # in one dimension: torch.compile would compile apart every count of blocks that may be 1
        q.new_empty(batch * heads * block_count(tokens, Q_BLOCK) * count, dtype=torch.int32),
    )


def _save_for_backward(ctx, inputs, output):
    q, k, v, _, _, alpha, _, _, precision, heads_first, scale, backend, _, ctx.linear_branch, _ = inputs
    ctx.save_for_backward(q, k, v, alpha, output[1], output[2])
    ctx.precision, ctx.heads_first, ctx.scale, ctx.backend = precision, heads_first, scale, backend


def _backward(ctx, grad_out, grad_row_ratio, grad_blocks):
    """Gradients on the saved selection: 16-bit in Triton; in torch those of its own formats, recomputed chunk by chunk."""
    q, k, v, alpha, row_ratio, key_blocks = ctx.saved_tensors
    *grads, grad_alpha = torch.ops.sla2.attention_backward(
        grad_out, q, k, v, key_blocks, row_ratio, ctx.heads_first, ctx.scale, alpha, ctx.precision, ctx.backend,
        None if alpha is None else grad_row_ratio, ctx.linear_branch,
    )  # fmt: skip
    return *grads, None, None, None if alpha is None else grad_alpha, *[None] * 9


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
    grad_row_ratio: Optional[Tensor] = None,
    linear_branch: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, d loss / d alpha, empty without alpha); key_blocks: those of each query block, in any shape."""
    backend = resolve_backend(backend, q.device, q.dtype, q.shape[3], precision)
    tensors = (grad_out.to(q.dtype), q, k, v)
    grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v)]
    if not heads_first:
        tensors, views = [t.transpose(1, 2) for t in tensors], [t.transpose(1, 2) for t in grads]
    else:
        views = grads
    grad_out, q, k, v = tensors
    key_blocks = key_blocks.reshape(*q.shape[:2], block_count(q.shape[2], Q_BLOCK), -1)
    if backend == "triton":
        from . import triton_backward

        grad_ratio = triton_backward.attention_backward(
            q, k, v, grad_out, key_blocks, row_ratio, *views, scale=scale, linear_branch=linear_branch
        )
    else:
        ratios = _ratios_of(alpha, q)
        grad_ratio = torch_backward.attention_backward(
            q, k, v, grad_out, key_blocks, ratios, *views, scale=scale, precision=precision, linear_branch=linear_branch
        )
    if alpha is None:
        return *grads, q.new_empty(0)
    grad_ratio = grad_ratio.sum(dim=0)
    # with every key block selected the ratio is 1, whatever alpha says; so it is in rows whose linear branch has no weight
    if grad_row_ratio is not None and key_blocks.shape[-1] < block_count(k.shape[2], K_BLOCK):
        rows = F.pad(grad_row_ratio.where(row_ratio < 1, 0.0), (0, -row_ratio.shape[-1] % Q_BLOCK))
        grad_ratio = grad_ratio + rows.unflatten(-1, (-1, Q_BLOCK)).sum(dim=(0, -1))
    return *grads, resample_ratio_gradient(grad_ratio, alpha.shape).to(alpha)


@_attention_backward.register_fake
def _(
    grad_out, q, k, v, key_blocks, row_ratio, heads_first, scale, alpha=None, precision="16bit", backend="triton",
    grad_row_ratio=None, linear_branch=True,
):  # fmt: skip
    return *(t.new_empty(t.shape) for t in (q, k, v)), q.new_empty(0) if alpha is None else alpha.new_empty(alpha.shape)


_attention.register_autograd(_backward, setup_context=_save_for_backward)
