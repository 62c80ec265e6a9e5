"""sla2_attention() and select_key_blocks(): the public functions of the operator.

They check their arguments (arguments.py) and call one torch operator (operators.py), so torch.compile sees no graph break.
"""

import torch

from . import operators
from .arguments import (
    check_alpha,
    check_diagonal,
    check_inputs,
    check_options,
    check_projections,
    check_selection,
    checked_pair,
    checked_scale,
    checked_sparsity,
    refuse_transforms,
)
from .forced_blocks import select_with_forced_blocks
from .router import Q_BLOCK
from .selection import checked_blocks, select_blocks


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
    room=(0, 0),
    exact_keys=(0, 0),
    query_block=Q_BLOCK,
):
    """Sparse-linear attention with a learned router (SLA2, arXiv 2602.12675, Eq. 13-16).

    Softmax attention over the top-k key blocks that the router picks for each query block, linear attention over the
    rest, mixed by alpha. Key blocks have 64 tokens, query blocks 128 or 64; any token count works.

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
        room: (before, behind), number of rows that the output has beside those of q, for the caller to fill: nothing is
            written there.
        exact_keys: (first, last), number of keys at the start and the end that all queries attend, in whole key blocks;
            ``sparsity`` is then of the other blocks, and ``keep_diagonal`` needs as many keys between them as queries.
            Ignored with ``key_blocks``.
        query_block: tokens of a query block, 128 or 64. T_m = ceil(N / query_block).

    Contents of proj_q, proj_k, alpha and key_blocks are checked on the CPU only, and not under torch.compile: on a GPU a
    check would wait for it.

    Returns:
        The output, contiguous, in q's layout and dtype, ``room`` included; with ``return_alpha`` also float32 (B, H, N).

    Raises:
        ValueError: an argument does not fit; the sentence says which and what is expected.
        NotImplementedError: q, k, v or alpha carries a tangent of forward-mode differentiation, or is differentiated by torch.func.
    """
    check_options(layout, backend, precision, query_block)
    check_inputs(layout, q=q, k=k, v=v)
    check_projections(proj_q, proj_k, q, layout)
    check_alpha(alpha, q, layout)
    if alpha is not None and not linear_branch:
        raise ValueError("alpha mixes the linear branch in: leave it out where linear_branch is False.")
    key_blocks, is_routed, forced, diagonal = checked_blocks(
        key_blocks, q, k, layout, keep_diagonal, query_block, exact_keys, sparsity
    )
    before, behind = checked_pair("room", room)
    refuse_transforms(q, k, v, alpha)
    out, row_ratio, _ = operators.attention(
        q,
        k,
        v,
        proj_q,
        proj_k,
        alpha,
        key_blocks,
        0.0 if key_blocks is not None else checked_sparsity(sparsity),
        precision,
        layout == "BHND",
        checked_scale(scale, q.shape[3]),
        backend,
        diagonal,
        bool(linear_branch),
        is_routed,
        before,
        behind,
        *forced,
        query_block,
    )
    return (out, row_ratio) if return_alpha else out


def select_key_blocks(
    q,
    k,
    proj_q=None,
    proj_k=None,
    *,
    sparsity,
    layout="BHND",
    backend="auto",
    keep_diagonal=False,
    query_block=Q_BLOCK,
):
    """The key blocks that the router picks, int32 (B, H, T_m, n), ascending, n = max(1, floor((1 - sparsity) * T_n)).

    Arguments as in :func:`sla2_attention`. Scores have the precision of float32; of equal scores the lowest index wins.
    """
    check_selection(q, k, proj_q, proj_k, layout, backend, query_block)
    if keep_diagonal:
        check_diagonal(q, k)
    if torch.compiler.is_compiling():
        # the same as one operator
        options = {"sparsity": sparsity, "layout": layout, "backend": backend, "keep_diagonal": keep_diagonal}
        return select_with_forced_blocks(q, k, proj_q, proj_k, **options, query_block=query_block)
    if layout == "BNHD":
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    diagonal = 0 if keep_diagonal else None
    return select_blocks(q, k, proj_q, proj_k, checked_sparsity(sparsity), backend, diagonal, query_block)
