"""Key blocks that every query block attends beside the router's own choice: text, reference and pose tokens.

Joint video models carry such tokens in front of the video's or behind them. The router picks among the key blocks that hold
video alone; every block with one of the others in it is added, so each query block keeps the same number of blocks.
"""

from typing import Optional

import torch
from torch import Tensor

from .arguments import TOKENS_DIM, checked_count, checked_sparsity
from .attention import check_selection, select_blocks
from .router import K_BLOCK, Q_BLOCK, block_count, selected_block_count


def forced_block_counts(tokens, front, back):
    """(forced blocks at the front, free blocks, forced blocks at the back) of ``tokens`` keys, ``front`` and ``back`` exact."""
    if front < 0 or back < 0 or front + back > tokens:
        raise ValueError(f"front and back must be at least 0 and at most {tokens} together, got {front} and {back}.")
    total = block_count(tokens, K_BLOCK)
    first = block_count(front, K_BLOCK)
    end = (tokens - back) // K_BLOCK if back else total
    return (first, end - first, total - end) if end > first else (total, 0, 0)


def select_with_forced_blocks(
    q, k, proj_q=None, proj_k=None, *, sparsity, front=0, back=0, layout="BHND", backend="auto", keep_diagonal=False
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
    check_selection(q, k, proj_q, proj_k, layout, backend)
    sparsity, front, back = checked_sparsity(sparsity), checked_count("front", front), checked_count("back", back)
    axis = TOKENS_DIM[layout]
    keys = k.shape[axis]
    forced_block_counts(keys, front, back)
    if keep_diagonal and q.shape[axis] != keys - front - back:
        raise ValueError(
            f"keep_diagonal needs as many keys between front and back as queries, got {keys - front - back} and {q.shape[axis]}."
        )
    with torch.no_grad():  # a choice has no derivative: none is asked for, in forward mode neither
        return torch.ops.sla2.select_with_forced_blocks(
            q, k, proj_q, proj_k, sparsity, front, back, layout == "BHND", backend, keep_diagonal
        )


def selected_with_forced(tokens, sparsity, front, back):
    """Number of key blocks of ``tokens`` keys that each query block attends."""
    before, free, after = forced_block_counts(tokens, front, back)
    return before + (selected_block_count(sparsity, free) if free else 0) + after


def attended_keys(tokens, sparsity, front=0, back=0):
    """Number of keys that each query attends exactly, at most: of ``tokens`` keys, in the blocks of selected_with_forced.

    The last block may be short. Where it is free, only the selection says which queries picked it, and it counts as whole:
    what follows from this number never overstates the share that is skipped.
    """
    before, free, after = forced_block_counts(tokens, front, back)
    if not free:
        return tokens
    free_keys = ((before + free) * K_BLOCK if after else tokens) - before * K_BLOCK
    return tokens - free_keys + min(selected_block_count(sparsity, free) * K_BLOCK, free_keys)


@torch.library.custom_op("sla2::select_with_forced_blocks", mutates_args=())
def _select(
    q: Tensor,
    k: Tensor,
    proj_q: Optional[Tensor],  # noqa: UP045  torch 2.6 derives an operator's schema from Optional only
    proj_k: Optional[Tensor],  # noqa: UP045
    sparsity: float,
    front: int,
    back: int,
    heads_first: bool,
    backend: str,
    keep_diagonal: bool = False,
) -> Tensor:
    if not heads_first:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    before, free, after = forced_block_counts(k.shape[2], front, back)
    rows = (*q.shape[:2], block_count(q.shape[2], Q_BLOCK))

    def always(first, count):
        blocks = torch.arange(first, first + count, dtype=torch.int32, device=q.device)
        return blocks.expand(*rows, count)

    if not free:
        return always(0, before).contiguous()
    # K's mean is subtracted before scoring: over the free keys instead of all it only moves a row's scores together
    keys = k[:, :, before * K_BLOCK : None if not after else (before + free) * K_BLOCK]
    diagonal = front - before * K_BLOCK if keep_diagonal else None
    picked = select_blocks(q, keys, proj_q, proj_k, sparsity, backend, diagonal) + before
    return torch.cat([always(0, before), picked, always(before + free, after)], dim=-1)


@_select.register_fake
def _(q, k, proj_q, proj_k, sparsity, front, back, heads_first, backend, keep_diagonal=False):
    tokens = 2 if heads_first else 1
    count = selected_with_forced(k.shape[tokens], sparsity, front, back)
    rows = (q.shape[0], q.shape[3 - tokens], block_count(q.shape[tokens], Q_BLOCK), count)
    return q.new_empty(rows, dtype=torch.int32)
