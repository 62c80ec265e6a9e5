"""SLA2 with a mixing ratio that is fitted in the call itself: no router file, no training.

Dense attention of a few query rows is computed, and each head takes the ratio that brings the mix closest to it. Inference
only: a ratio that training is to learn starts from ``alpha=None``.
"""

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from . import loops, torch_backend, torch_fit
from .arguments import (
    TOKENS_DIM,
    check_diagonal,
    check_inputs,
    check_options,
    check_projections,
    checked_scale,
    checked_sparsity,
)
from .attention import RoutedBlocks, _distinct, _route, _swapped
from .router import K_BLOCK, Q_BLOCK, block_count, selected_block_count
from .support import resolve_backend, triton_reason, without_autocast

SAMPLE_ROWS = 32
FITTED_ROWS = 24  # of them decide the ratio; the others can judge the result


class Fitted(NamedTuple):
    """out: in q's layout and dtype. ratio: float32 (B, H). dense: float32 (B, H, R, D), dense attention of the sampled rows."""

    out: Tensor
    ratio: Tensor
    dense: Tensor


def sample_rows(tokens, number, device="cpu"):
    """SAMPLE_ROWS of ``tokens`` query rows, int32 (32,): one drawn from each of 32 equal stretches, in random order.

    number: of the draw. A number gives one sample, whatever was drawn before.
    """
    generator = torch.Generator().manual_seed(number)
    places = torch.arange(SAMPLE_ROWS) + torch.rand(SAMPLE_ROWS, generator=generator, dtype=torch.float64)
    rows = (places * (tokens / SAMPLE_ROWS)).long().clamp(max=tokens - 1)
    rows = rows[torch.randperm(SAMPLE_ROWS, generator=generator)].to(torch.int32)
    # does not wait for the device: from ordinary memory the copy is staged before this returns
    return rows.to(device, non_blocking=True)


@torch.no_grad()
def squared_error(out, dense, rows):
    """float32 (2,): squared norms of the error of ``out`` in these rows, and of ``dense``. Rows that are not finite are left out.

    out: (B, H, N, D). dense: float32 (B, H, R, D), what rows ``rows``, integers (R,), should be.
    """
    error = out.index_select(2, rows).float() - dense
    squares = torch.stack([error.square().sum(dim=-1), dense.square().sum(dim=-1)])  # (2, B, H, R)
    return torch.where(squares.isfinite().all(dim=0), squares, 0.0).sum(dim=(1, 2, 3))


def fitted_attention(
    q, k, v, proj_q=None, proj_k=None, *, rows, fitted=FITTED_ROWS, sparsity=0.97, precision="int8", layout="BHND", scale=None,
    key_blocks=None, backend="auto", keep_diagonal=False,
):  # fmt: skip
    """SLA2 attention whose mixing ratio, one per video and head, is fitted by least squares on some query rows.

    Args:
        rows: int32 (R,) on q's device, distinct query rows (see :func:`sample_rows`); R is a power of two from 16.
        fitted: so many of the rows, the first ones, decide the ratio.
        The rest as in :func:`sla2_kernels.sla2_attention`; at least one key block must be left out.

    Returns:
        Fitted. What ``rows[fitted:]`` of ``out`` have of an error against ``dense`` is what all rows have, within the spread
        of a sample: they did not enter the fit.

    Raises:
        ValueError: an argument does not fit; the sentence says which and what is expected.
    """
    check_options(layout, backend, precision)
    check_inputs(layout, q=q, k=k, v=v)
    _, heads, tokens, head_dim = q.shape if layout == "BHND" else _swapped(q.shape)
    check_projections(proj_q, proj_k, heads, head_dim)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v)):
        raise ValueError(
            "a fitted ratio has no gradients: train with sla2_attention and alpha=None, which estimates it."
        )
    if keep_diagonal and key_blocks is None:
        check_diagonal(q, k)
    is_routed = isinstance(key_blocks, RoutedBlocks)
    key_blocks = key_blocks.key_blocks if is_routed else key_blocks
    blocks = block_count(k.shape[TOKENS_DIM[layout]], K_BLOCK)
    sparsity = checked_sparsity(sparsity)
    count = selected_block_count(sparsity, blocks) if key_blocks is None else key_blocks.shape[-1]
    if count >= blocks:
        raise ValueError(f"a fitted ratio needs a key block that is left out, and {count} of {blocks} are selected.")
    if rows.dtype != torch.int32 or rows.dim() != 1 or rows.shape[0] < 16 or rows.shape[0] & (rows.shape[0] - 1):
        raise ValueError(
            f"rows must be int32 (R,), R a power of two from 16, got {str(rows.dtype).removeprefix('torch.')} {tuple(rows.shape)}."
        )
    if not 1 <= fitted <= rows.shape[0]:
        raise ValueError(f"fitted must lie between 1 and the {rows.shape[0]} rows, got {fitted}.")
    return Fitted(
        *torch.ops.sla2.fitted_attention(
            q, k, v, proj_q, proj_k, key_blocks, rows, fitted, sparsity, precision, layout == "BHND",
            checked_scale(scale, head_dim), backend, 0 if keep_diagonal else None, is_routed,
        )
    )  # fmt: skip


@torch.library.custom_op("sla2::fitted_attention", mutates_args=())
def _fitted_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    proj_q: Optional[Tensor],
    proj_k: Optional[Tensor],
    key_blocks: Optional[Tensor],
    rows: Tensor,
    fitted: int,
    sparsity: float,
    precision: str,
    heads_first: bool,
    scale: float,
    backend: str,
    diagonal: Optional[int] = None,
    is_routed: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, ratio, dense); see fitted_attention. is_routed: key_blocks were RoutedBlocks."""
    backend = resolve_backend(backend, q.device, q.dtype, q.shape[3], precision)
    result = out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not heads_first:
        q, k, v, out = (t.transpose(1, 2) for t in (q, k, v, out))
    if key_blocks is not None and not is_routed:
        key_blocks = _distinct(key_blocks, block_count(k.shape[2], K_BLOCK))
    dense = torch.empty(*q.shape[:2], rows.shape[0], q.shape[3], dtype=torch.float32, device=q.device)
    if backend == "triton":
        from . import triton_backend

        row_ratio, _ = triton_backend.attention(
            q, k, v, proj_q, proj_k, key_blocks, None, out, sparsity=sparsity, scale=scale, precision=precision,
            diagonal=diagonal, sample=triton_backend.Sample(rows, fitted, dense),
        )  # fmt: skip
        return result, row_ratio[..., 0].clone(), dense
    if key_blocks is None:
        key_blocks = _route(q, k, proj_q, proj_k, sparsity, backend, diagonal)
    reason = triton_reason(q.device, q.dtype, q.shape[3], precision)
    loops.took_loop(loops.TORCH, reason or 'backend "torch" was asked for')
    with without_autocast(q.device):
        ratio = torch_fit.fit_ratio(q, k, v, key_blocks, rows, fitted, dense, scale)
    ratios = ratio[..., None].expand(-1, -1, block_count(q.shape[2], Q_BLOCK))
    torch_backend.attention(q, k, v, key_blocks, ratios, out, scale=scale, precision=precision)
    return result, ratio.float(), dense


@_fitted_attention.register_fake
def _(
    q, k, v, proj_q, proj_k, key_blocks, rows, fitted, sparsity, precision, heads_first, scale, backend, diagonal=None,
    is_routed=False,
):  # fmt: skip
    batch, heads, _, head_dim = q.shape if heads_first else _swapped(q.shape)
    return (
        q.new_empty(q.shape),
        q.new_empty((batch, heads), dtype=torch.float32),
        q.new_empty((batch, heads, rows.shape[0], head_dim), dtype=torch.float32),
    )
