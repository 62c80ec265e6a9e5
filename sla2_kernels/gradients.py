"""Autograd of ``sla2::attention``: what the forward pass keeps, and ``sla2::attention_backward``, an operator of its own."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from . import torch_backward
from .router import K_BLOCK, Q_BLOCK, block_count, ratio_per_block, resample_ratio_gradient
from .support import resolve_backend


def save_for_backward(ctx, inputs, output):
    """Nothing but inputs, the selection and the ratios is kept: the backward pass computes the rest again."""
    q, k, v, _, _, alpha, _, _, precision, heads_first, scale, backend, _, ctx.linear_branch, _, ctx.before, *others = (
        inputs
    )
    ctx.query_block = others[-1]
    ctx.save_for_backward(q, k, v, alpha, output[1], output[2])
    ctx.precision, ctx.heads_first, ctx.scale, ctx.backend = precision, heads_first, scale, backend


def backward(ctx, grad_out, grad_row_ratio, grad_blocks):
    """Gradients on the saved selection: 16-bit in Triton; in torch those of its own formats, recomputed chunk by chunk."""
    q, k, v, alpha, row_ratio, key_blocks = ctx.saved_tensors
    tokens = 2 if ctx.heads_first else 1
    grad_out = grad_out.narrow(tokens, ctx.before, q.shape[tokens])  # not of the rows that are the caller's
    grad_row_ratio = None if alpha is None else grad_row_ratio
    formats = ctx.heads_first, ctx.scale, alpha, ctx.precision, ctx.backend
    options = *formats, grad_row_ratio, ctx.linear_branch, ctx.query_block
    *grads, grad_alpha = torch.ops.sla2.attention_backward(grad_out, q, k, v, key_blocks, row_ratio, *options)
    return *grads, None, None, None if alpha is None else grad_alpha, *[None] * 14


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
    query_block: int = Q_BLOCK,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, d loss / d alpha, empty without alpha); key_blocks: those of each query block, in any shape."""
    chosen = resolve_backend(backend, q.device, q.dtype, q.shape[3], precision)
    tensors = (q, k, v, grad_out.to(q.dtype))
    grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v)]
    views = grads
    if not heads_first:
        tensors, views = ([t.transpose(1, 2) for t in group] for group in (tensors, grads))
    q, k, v, grad_out = tensors
    key_blocks = key_blocks.reshape(*q.shape[:2], block_count(q.shape[2], query_block), -1)
    if chosen.name == "triton":
        from . import triton_backward

        grad_ratio = triton_backward.attention_backward(
            *tensors, key_blocks, row_ratio, *views,
            scale=scale, linear_branch=linear_branch, query_block=query_block,
        )  # fmt: skip
    else:
        ratio = ratio_per_block(alpha, q, query_block)
        grad_ratio = torch_backward.attention_backward(
            *tensors, key_blocks, ratio, *views,
            scale=scale, precision=precision, linear_branch=linear_branch, query_block=query_block,
        )  # fmt: skip
    if alpha is None:
        return *grads, q.new_empty(0)
    grad_ratio = grad_ratio.sum(dim=0)
    # where every key block is selected, or the linear branch has no weight, the returned ratio is 1 whatever alpha says
    if grad_row_ratio is not None and key_blocks.shape[-1] < block_count(k.shape[2], K_BLOCK):
        rest = -row_ratio.shape[-1] % query_block
        grads_of_rows, used = (
            F.pad(x, (0, rest)).unflatten(-1, (-1, query_block)) for x in (grad_row_ratio, row_ratio)
        )
        # a 1 that alpha says looks the same: the linear branch is taken to have weight there
        is_alphas = (used < 1) | (ratio_per_block(alpha, q, query_block).float() >= 1)[..., None]
        grad_ratio = grad_ratio + grads_of_rows.where(is_alphas, 0.0).sum(dim=(0, -1))
    return *grads, resample_ratio_gradient(grad_ratio, alpha.shape).to(alpha)


@_attention_backward.register_fake
def _(grad_out, q, k, v, key_blocks, row_ratio, heads_first, scale, alpha=None, *_, **__):
    return *(t.new_empty(t.shape) for t in (q, k, v)), q.new_empty(0) if alpha is None else alpha.new_empty(alpha.shape)
