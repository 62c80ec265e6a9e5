"""Which key blocks each query block attends: chosen by the router, or handed in and brought into shape."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import router
from .arguments import TOKENS_DIM, check_diagonal, check_key_blocks, checked_pair, checked_sparsity
from .router import K_BLOCK, MAX_OWN_BLOCKS, block_count, selected_beside, selected_block_count
from .support import resolve_backend


class ForcedBlocks(NamedTuple):
    """Key blocks of a sequence: forced ones at the start, those that the router picks from, forced ones at the end."""

    prefix: int
    free: int
    suffix: int

    def selected(self, sparsity):
        """Number of key blocks that each query block attends; ``sparsity`` is the share of the free ones that is skipped."""
        return selected_beside((self.prefix, self.suffix), sparsity, sum(self))

    def has_room_for_own(self, sparsity):
        """Whether keep_diagonal leaves the forced ones at the end: a query block's own ones come before them."""
        return not self.suffix or self.selected(sparsity) - self.prefix - self.suffix >= min(MAX_OWN_BLOCKS, self.free)

    def attended_keys(self, tokens, sparsity):
        """Upper bound on the keys, of ``tokens``, that each query attends exactly.

        The last block may be short. Where it is free, which queries picked it depends on the selection, and it counts as whole:
        the share of skipped keys that follows is never overstated.
        """
        if not self.free:
            return tokens
        free_keys = ((self.prefix + self.free) * K_BLOCK if self.suffix else tokens) - self.prefix * K_BLOCK
        return tokens - free_keys + min(selected_block_count(sparsity, self.free) * K_BLOCK, free_keys)


def forced_block_counts(tokens, prefix, suffix):
    """ForcedBlocks of ``tokens`` keys, of which the first ``prefix`` and the last ``suffix`` are attended by every query."""
    if prefix < 0 or suffix < 0 or prefix + suffix > tokens:
        raise ValueError(f"front and back must be at least 0 and at most {tokens} together, got {prefix} and {suffix}.")
    total = block_count(tokens, K_BLOCK)
    first = block_count(prefix, K_BLOCK)
    end = (tokens - suffix) // K_BLOCK if suffix else total
    return ForcedBlocks(first, end - first, total - end) if end > first else ForcedBlocks(total, 0, 0)


class RoutedBlocks(NamedTuple):
    """``key_blocks`` that this package's own router selected: ascending and distinct, so neither checked nor sorted again."""

    key_blocks: Tensor


def checked_blocks(key_blocks, q, k, layout, keep_diagonal, query_block, exact_keys=(0, 0), sparsity=0.0):
    """What selects the key blocks of a call; raises ValueError where its arguments do not fit.

    keep_diagonal needs as many keys between the exact ones as queries; both are ignored where ``key_blocks`` are given.
    Among blocks that must be taken the first ones come first, so that keep_diagonal beside exact keys at the end needs room.

    Returns:
        (key blocks or None, whether they were RoutedBlocks, key blocks at the start and the end that hold exact keys, the place
        among the keys of the first query's own key or None).
    """
    if isinstance(key_blocks, RoutedBlocks):
        return key_blocks.key_blocks, True, (0, 0), None
    if key_blocks is not None:
        tokens, keys = (t.shape[TOKENS_DIM[layout]] for t in (q, k))
        heads = q.shape[3 - TOKENS_DIM[layout]]
        rows = q.shape[0], heads, block_count(tokens, query_block)
        check_key_blocks(key_blocks, rows, block_count(keys, K_BLOCK), q.device)
        return key_blocks, False, (0, 0), None
    (first, last), axis = checked_pair("exact_keys", exact_keys), TOKENS_DIM[layout]
    keys = k.shape[axis]
    if first + last > keys:
        raise ValueError(f"exact_keys must be at most {keys} together, got {first} and {last}.")
    forced = forced_block_counts(keys, first, last)
    if keep_diagonal:
        check_diagonal(q, k.narrow(axis, first, keys - first - last))
        if not forced.has_room_for_own(checked_sparsity(sparsity)):
            raise ValueError(
                f"keep_diagonal beside exact keys at the end needs {MAX_OWN_BLOCKS} selected key blocks before them: lower "
                "sparsity, or pass key_blocks of select_with_forced_blocks()."
            )
    return None, False, (forced.prefix, forced.suffix), first if keep_diagonal else None


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
