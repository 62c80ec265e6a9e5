"""Key blocks that every query block attends beside the router's own choice: text, reference and pose tokens.

Joint video models carry such tokens before the video's or after them. The router picks among the key blocks that hold nothing
but video; every block with one of the other tokens in it is added, so each query block keeps the same number of blocks.
"""

from typing import Optional

import torch
from torch import Tensor

from .arguments import TOKENS_DIM, check_selection, checked_count, checked_sparsity
from .router import K_BLOCK, Q_BLOCK, block_count
from .selection import forced_block_counts, select_blocks


def select_with_forced_blocks(
    q,
    k,
    proj_q=None,
    proj_k=None,
    *,
    sparsity,
    front=0,
    back=0,
    layout="BHND",
    backend="auto",
    keep_diagonal=False,
    query_block=Q_BLOCK,
):
    """The router's choice among the free key blocks, and all forced ones.

    Args:
        q: (B, H, N, D), or (B, N, H, D) with layout "BNHD": the queries of the video alone.
        k: (B, H, M, D) or (B, M, H, D): all keys.
        front, back: keys at the start and the end that every query attends exactly.
        sparsity: share of the free key blocks that is skipped, 0 to below 1.
        keep_diagonal: among its free blocks each query block always takes those of its own tokens; needs as many keys
            between front and back as queries.
        The rest as in :func:`sla2_kernels.select_key_blocks`.

    Returns:
        int32 (B, H, T_m, n), ascending, for ``key_blocks`` of sla2_attention; n is :func:`selected_with_forced`.

    Raises:
        ValueError: an argument does not fit; the sentence says which and what is expected.
    """
    check_selection(q, k, proj_q, proj_k, layout, backend, query_block)
    sparsity, prefix, suffix = checked_sparsity(sparsity), checked_count("front", front), checked_count("back", back)
    axis = TOKENS_DIM[layout]
    keys = k.shape[axis]
    forced_block_counts(keys, prefix, suffix)
    video_keys = keys - prefix - suffix
    if keep_diagonal and q.shape[axis] != video_keys:
        raise ValueError(
            f"keep_diagonal needs as many keys between front and back as queries, got {video_keys} and {q.shape[axis]}."
        )
    with torch.no_grad():  # a selection has no derivative, in forward mode either
        return torch.ops.sla2.select_with_forced_blocks(
            q, k, proj_q, proj_k, sparsity, prefix, suffix, layout == "BHND", backend, keep_diagonal, query_block
        )


def selected_with_forced(tokens, sparsity, prefix, suffix):
    """Number of key blocks of ``tokens`` keys that each query block attends: n of :func:`select_with_forced_blocks`."""
    return forced_block_counts(tokens, prefix, suffix).selected(sparsity)


def attended_keys(tokens, sparsity, prefix=0, suffix=0):
    """Upper bound on the keys that each query attends exactly: see :meth:`ForcedBlocks.attended_keys`."""
    return forced_block_counts(tokens, prefix, suffix).attended_keys(tokens, sparsity)


@torch.library.custom_op("sla2::select_with_forced_blocks", mutates_args=())
def _select(
    q: Tensor,
    k: Tensor,
    proj_q: Optional[Tensor],  # noqa: UP045  torch 2.6 derives an operator's schema from Optional only
    proj_k: Optional[Tensor],  # noqa: UP045
    sparsity: float,
    prefix: int,
    suffix: int,
    heads_first: bool,
    backend: str,
    keep_diagonal: bool = False,
    query_block: int = Q_BLOCK,
) -> Tensor:
    if not heads_first:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    forced = forced_block_counts(k.shape[2], prefix, suffix)
    rows = (*q.shape[:2], block_count(q.shape[2], query_block))

    def always(first, count):
        blocks = torch.arange(first, first + count, dtype=torch.int32, device=q.device)
        return blocks.expand(*rows, count)

    if not forced.free:
        return always(0, forced.prefix).contiguous()
    end = forced.prefix + forced.free
    # K's mean is subtracted before scoring: taken over the free keys alone it shifts all scores of a row equally
    keys = k[:, :, forced.prefix * K_BLOCK : end * K_BLOCK if forced.suffix else None]
    diagonal = prefix - forced.prefix * K_BLOCK if keep_diagonal else None
    picked = select_blocks(q, keys, proj_q, proj_k, sparsity, backend, diagonal, query_block) + forced.prefix
    return torch.cat([always(0, forced.prefix), picked, always(end, forced.suffix)], dim=-1)


@_select.register_fake
def _(q, k, proj_q, proj_k, sparsity, prefix, suffix, heads_first, backend, keep_diagonal=False, query_block=Q_BLOCK):
    tokens = 2 if heads_first else 1
    count = selected_with_forced(k.shape[tokens], sparsity, prefix, suffix)
    rows = (q.shape[0], q.shape[3 - tokens], block_count(q.shape[tokens], query_block), count)
    return q.new_empty(rows, dtype=torch.int32)
