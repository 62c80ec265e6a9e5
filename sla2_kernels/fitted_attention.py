"""SLA2 with a mixing ratio that is fitted in the call itself: no router file, no training.

Dense attention of a few query rows is computed, and each head takes the ratio that brings the mix closest to it. Inference
only: a ratio that training is to learn starts from ``alpha=None``.
"""

import random
from typing import NamedTuple

import torch
from torch import Tensor

from . import operators
from .arguments import (
    TOKENS_DIM,
    check_inputs,
    check_options,
    check_projections,
    check_sample,
    checked_pair,
    checked_scale,
    checked_sparsity,
)
from .router import K_BLOCK, Q_BLOCK, block_count, selected_beside
from .selection import checked_blocks
from .support import on_device, resolve_backend

SAMPLE_ROWS = 32
FITTED_ROWS = 24  # of them decide the ratio; the others can judge the result


class Fitted(NamedTuple):
    """out: in q's layout and dtype, ``room`` included. ratio: float32 (B, H). dense: float32 (B, H, R, D), dense attention of
    the sampled rows."""

    out: Tensor
    ratio: Tensor
    dense: Tensor


def sample_rows(tokens, number, device="cpu"):
    """SAMPLE_ROWS of ``tokens`` query rows, int32 (32,): one drawn from each of 32 equal stretches, in random order.

    number: of the draw. A number gives one sample, whatever was drawn before.
    """
    # not with torch's generator: a dozen operations on 32 numbers take longer than a short call's kernels
    draw, stretch = random.Random(number), tokens / SAMPLE_ROWS  # noqa: S311
    rows = [int((place + draw.random()) * stretch) for place in range(SAMPLE_ROWS)]
    rows[-1] = min(rows[-1], tokens - 1)  # the last sum may round up to SAMPLE_ROWS
    draw.shuffle(rows)
    # does not wait for the device: from ordinary memory the copy is staged before this returns
    return torch.tensor(rows, dtype=torch.int32).to(device, non_blocking=True)


@torch.no_grad()
def squared_error(out, dense, rows):
    """float32 (2,): the squared norm of ``out`` - ``dense`` in these rows, and that of ``dense``; rows with NaN or infinity are left out.

    out: (B, H, N, D). dense: float32 (B, H, R, D), what rows ``rows``, integers (R,), should be.
    """
    return _squares(out, dense, rows)[0].sum(dim=1)


@torch.no_grad()
def call_errors(out, dense, rows, fitted=FITTED_ROWS):
    """The errors of one call, float32 (5,), on the device.

    These are, over the rows from ``fitted`` on: the squared norm of ``out`` - ``dense``, that of ``dense``, and their
    quotient; the same quotient over all rows; and how many rows of a head are left out for NaN or infinity.
    The other arguments are those of squared_error().
    """
    if resolve_backend("auto", out.device, out.dtype, out.shape[3], "16bit").name == "triton":
        from .kernels.row_errors import row_errors

        with on_device(out.device):
            return row_errors(out, dense, rows, fitted)
    squares, left_out = _squares(out, dense, rows)
    judged, everything = squares[:, fitted:].sum(dim=1), squares.sum(dim=1)
    relative = torch.stack([part[0] / part[1] for part in (judged, everything)]).nan_to_num(nan=0.0, posinf=0.0)
    return torch.cat([judged, relative, left_out[None]])


def _squares(out, dense, rows):
    """(squared norms of ``out`` - ``dense`` and of ``dense`` (2, R), float32 () number of rows left out)."""
    error = out.index_select(2, rows).float() - dense
    squares = torch.stack([error, dense]).square().sum(dim=-1)  # (2, B, H, R)
    is_finite = squares.isfinite().all(dim=0)
    return torch.where(is_finite, squares, 0.0).sum(dim=(1, 2)), (~is_finite).sum(dtype=torch.float32)


def fitted_attention(
    q,
    k,
    v,
    proj_q=None,
    proj_k=None,
    *,
    rows,
    fitted=FITTED_ROWS,
    sparsity=0.97,
    precision="int8",
    layout="BHND",
    scale=None,
    key_blocks=None,
    backend="auto",
    keep_diagonal=False,
    room=(0, 0),
    exact_keys=(0, 0),
    query_block=Q_BLOCK,
):
    """SLA2 attention whose mixing ratio, one per video and head, is fitted by least squares on some query rows.

    Args:
        rows: int32 (R,) on q's device, distinct query rows (see :func:`sample_rows`); R is a power of two from 16.
        fitted: so many of the rows, the first ones, decide the ratio.
        The rest as in :func:`sla2_kernels.sla2_attention`; at least one key block must be left out.

    Returns:
        Fitted. ``rows[fitted:]`` did not enter the fit, so the error of ``out`` against ``dense`` in them estimates the error
        over all rows.

    Raises:
        ValueError: an argument does not fit; the sentence says which and what is expected.
    """
    check_options(layout, backend, precision, query_block)
    check_inputs(layout, q=q, k=k, v=v)
    head_dim = q.shape[3]
    check_projections(proj_q, proj_k, q, layout)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v)):
        raise ValueError(
            "a fitted ratio has no gradients: train with sla2_attention and alpha=None, which estimates it."
        )
    key_blocks, is_routed, forced, diagonal = checked_blocks(
        key_blocks, q, k, layout, keep_diagonal, query_block, exact_keys, sparsity
    )
    blocks, sparsity = block_count(k.shape[TOKENS_DIM[layout]], K_BLOCK), checked_sparsity(sparsity)
    count = selected_beside(forced, sparsity, blocks) if key_blocks is None else key_blocks.shape[-1]
    if count >= blocks:
        raise ValueError(f"a fitted ratio needs a key block that is left out, and {count} of {blocks} are selected.")
    fitted = check_sample(rows, fitted, q, q.shape[TOKENS_DIM[layout]])
    before, behind = checked_pair("room", room)
    return Fitted(
        *operators.fitted_attention(
            q,
            k,
            v,
            proj_q,
            proj_k,
            key_blocks,
            rows,
            fitted,
            sparsity,
            precision,
            layout == "BHND",
            checked_scale(scale, head_dim),
            backend,
            diagonal,
            is_routed,
            before,
            behind,
            *forced,
            query_block,
        )
    )
