"""Which key blocks each query block attends: chosen by the router, or handed in and brought into shape."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import router
from .arguments import TOKENS_DIM, check_diagonal, check_key_blocks
from .router import K_BLOCK, block_count, selected_block_count
from .support import resolve_backend


class RoutedBlocks(NamedTuple):
    """``key_blocks`` that this package's own router selected: ascending and distinct, so neither checked nor sorted again."""

    key_blocks: Tensor


def checked_blocks(key_blocks, q, k, layout, keep_diagonal, query_block):
    """(key blocks or None, whether they were RoutedBlocks) of a call's arguments; raises ValueError where they do not fit.

    keep_diagonal needs as many keys as queries, but is ignored where ``key_blocks`` are given.
    """
    if isinstance(key_blocks, RoutedBlocks):
        return key_blocks.key_blocks, True
    if key_blocks is not None:
        tokens, keys = (t.shape[TOKENS_DIM[layout]] for t in (q, k))
        heads = q.shape[3 - TOKENS_DIM[layout]]
        rows = q.shape[0], heads, block_count(tokens, query_block)
        check_key_blocks(key_blocks, rows, block_count(keys, K_BLOCK), q.device)
    elif keep_diagonal:
        check_diagonal(q, k)
    return key_blocks, False


def select_blocks(q, k, proj_q, proj_k, sparsity, backend, diagonal, query_block):
    """select_key_blocks() of checked BHND views.

    diagonal: position among the keys of the first query's own key, whose block (and so on along the sequence) is always
    selected; None leaves the choice to the scores.
    """
    count = selected_block_count(sparsity, block_count(k.shape[2], K_BLOCK))
    if resolve_backend(backend, q.device, q.dtype, q.shape[3], "16bit").name == "triton":
        from . import triton_backend

        return triton_backend.route(q, k, proj_q, proj_k, count, diagonal, query_block)
    return router.route(q, k, proj_q, proj_k, count, diagonal, query_block)


def distinct_blocks(key_blocks, count):
    """Ascending int32 rows of distinct indices in 0 to count - 1; those of a valid selection are only sorted.

    A repeat becomes the next index up; where that would leave the range, the last indices are taken. Never waits for a GPU.
    """
    steps = torch.arange(key_blocks.shape[-1], dtype=torch.int32, device=key_blocks.device)
    # clamped before the cast: an int64 index that does not fit into 32 bits would wrap into the valid range
    ordered = key_blocks.clamp(0, count - 1).to(torch.int32).sort(dim=-1).values
    # a running maximum of (index - position) makes every index exceed the one before it
    return ((ordered - steps).cummax(dim=-1).values + steps).minimum(steps + (count - len(steps)))
