"""Where a video and its references lie in one sequence, and which blocks of queries and keys follow from it.

A stretch is a run of tokens that belong together: the video, a reference image or a reference video. What lies between the
stretches (text, sound) stays exact. No query block and no routed key block holds tokens of two stretches:

- Query blocks are laid out stretch by stretch. The last block of a stretch reaches back to whole 128 tokens, and a stretch that
  is shorter repeats its own, so that a few rows are computed twice and taken once.
- Key blocks stay on the sequence's own grid of 64. One with tokens of two stretches, or with an exact token, is attended by every
  query, and so never routed.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch

from .arguments import checked_count
from .router import K_BLOCK, Q_BLOCK, block_count, selected_block_count
from .support import without_autocast

MAX_OWN_BLOCKS = Q_BLOCK // K_BLOCK + 1  # key blocks with tokens of one query block, where the grids do not meet


@dataclass(frozen=True)
class Stretches:
    """tokens: of the whole sequence. video, references: (start, stop) of each. Raises ValueError where they do not fit."""

    tokens: int
    video: tuple[int, int]
    references: tuple[tuple[int, int], ...] = ()

    def __post_init__(self):
        for name, (start, stop) in (("video", self.video), *(("references", one) for one in self.references)):
            start, stop = checked_count(name, start), checked_count(name, stop)
            if not 0 <= start < stop <= self.tokens:
                raise ValueError(
                    f"{name} must name tokens of 0 to {self.tokens}, start below stop, got {(start, stop)}."
                )
        if any(after[0] < before[1] for before, after in pairwise(self.ordered)):
            raise ValueError(f"references and video must not overlap, got {self.references} and {self.video}.")

    @property
    def ordered(self):
        """All stretches as they follow each other."""
        return sorted((self.video, *self.references))

    @property
    def exact(self):
        """(start, stop) of what lies before, between and behind the stretches."""
        edges = [0, *(edge for stretch in self.ordered for edge in stretch), self.tokens]
        return [(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True) if start < stop]

    @property
    def sparse_rows(self):
        """Number of query rows that run sparse."""
        return sum(stop - start for start, stop in self.ordered)

    @property
    def gathered_rows(self):
        """Number of rows of gathered_queries()."""
        return sum(stop - start for parts in self.query_parts() for start, stop in parts)

    def query_parts(self):
        """[[(start, stop), ...] of each stretch]: laid end to end they fill whole query blocks, but for the last one."""
        *others, last = self.ordered
        return [*(_whole_blocks(*stretch) for stretch in others), [last]]

    def query_ranges(self, query_block=Q_BLOCK):
        """(first token, end) of each query block of gathered_queries(), a block that repeats its stretch being all of it."""
        ranges = []
        for (start, stop), parts in zip(self.ordered, self.query_parts(), strict=True):
            if parts[0] == (start, stop) and len(parts) > 1:
                ranges += [(start, stop)] * (Q_BLOCK // query_block)
                continue
            for first, end in parts:
                ranges += [(at, min(at + query_block, end)) for at in range(first, end, query_block)]
        return ranges

    def key_blocks(self, floor, exact_references=False):
        """([whether every query attends it] of each key block, [(first, end) of the routed blocks of a reference, ...]).

        floor: routed key blocks of each reference that every query attends at least; a reference of no more is attended whole.
        """
        always = [True] * block_count(self.tokens, K_BLOCK)
        ranges = []
        for stretch in self.ordered:
            first, end = block_count(stretch[0], K_BLOCK), stretch[1] // K_BLOCK
            end = len(always) if stretch[1] == self.tokens else end
            is_reference = stretch != self.video
            if end <= first or (is_reference and (exact_references or end - first <= floor)):
                continue
            always[first:end] = [False] * (end - first)
            ranges += [(first, end)] if is_reference and floor else []
        return always, ranges

    def selected(self, sparsity, floor, exact_references=False, keep_diagonal=False):
        """Key blocks that each query block attends: the forced ones, and of the routed ones the share, or what the floors take."""
        always, ranges = self.key_blocks(floor, exact_references)
        free = len(always) - sum(always)
        if not free:
            return len(always)
        least = floor * len(ranges) + (MAX_OWN_BLOCKS if keep_diagonal else 0)
        return len(always) - free + min(max(selected_block_count(sparsity, free), least), free)


def _whole_blocks(start, stop):
    """Parts of a stretch that fill whole query blocks."""
    length = stop - start
    full = length // Q_BLOCK * Q_BLOCK
    if full == length:
        return [(start, stop)]
    if full:
        return [(start, start + full), (stop - Q_BLOCK, stop)]
    times, rest = divmod(Q_BLOCK, length)
    return [(start, stop)] * times + ([(start, start + rest)] if rest else [])


def gathered_queries(q, stretches, axis):
    """The queries of all stretches in whole blocks, from those of the whole sequence; ``axis`` is q's token dimension."""
    with without_autocast(q.device):
        return torch.cat(
            [q.narrow(axis, start, stop - start) for parts in stretches.query_parts() for start, stop in parts],
            dim=axis,
        )


def whole_output(out, dense, stretches, axis):
    """The output of the whole sequence.

    out: of gathered_queries(), ``axis`` its token dimension. dense(ranges): exact attention of the query rows in these
    (start, stop), end to end, as a tensor of out's layout; called once, or not at all.
    """
    pieces, at = {}, 0
    for (start, stop), parts in zip(stretches.ordered, stretches.query_parts(), strict=True):
        length, rows = stop - start, sum(end - first for first, end in parts)
        full = min(length, length // Q_BLOCK * Q_BLOCK if rows > length else length)
        if full < length < Q_BLOCK:
            pieces[start] = [out.narrow(axis, at, length)]
        else:
            tail = length - full
            pieces[start] = [out.narrow(axis, at, full)] + ([out.narrow(axis, at + rows - tail, tail)] if tail else [])
        at += rows
    exact = stretches.exact
    if exact:
        computed, at = dense(exact), 0
        for start, stop in exact:
            pieces[start] = [computed.narrow(axis, at, stop - start)]
            at += stop - start
    # under autocast the exact rows may have the other 16-bit dtype, and torch.cat refuses to join the two
    with without_autocast(out.device):
        return torch.cat([piece.to(out.dtype) for start in sorted(pieces) for piece in pieces[start]], dim=axis)
