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
from .router import K_BLOCK, MAX_OWN_BLOCKS, Q_BLOCK, block_count, selected_block_count
from .support import without_autocast


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
        found = []
        for stretch in (self.video, *self.references):
            # not sorted(): torch.compile does not sort symbolic lengths
            found.insert(len([other for other in found if other[0] < stretch[0]]), stretch)
        return found

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

    def pieces(self):
        """[(first token, first row of gathered_queries(), rows), ...]: where the output of every token is computed, once."""
        found, at = [], 0
        for (start, stop), parts in zip(self.ordered, self.query_parts(), strict=True):
            length, rows = stop - start, sum(end - first for first, end in parts)
            # behind the whole blocks of a longer stretch comes its last block, which reaches back
            full = length // Q_BLOCK * Q_BLOCK if rows > length >= Q_BLOCK else length
            found.append((start, at, full))
            if full < length:
                found.append((start + full, at + rows - (length - full), length - full))
            at += rows
        return found

    @property
    def room(self):
        """(before, behind): rows beside those of gathered_queries() that make the output whole, its longest piece in place."""
        begin = self._first_row
        return max(0, begin), max(0, self.tokens - begin - self.gathered_rows)

    @property
    def _first_row(self):
        """The token in whose place the first row of gathered_queries() stands; below 0 where that is before all tokens."""
        longest, *others = self.pieces()
        for piece in others:
            longest = piece if piece[2] > longest[2] else longest
        return longest[0] - longest[1]

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


def gathered_rows(out, stretches, axis):
    """The rows of gathered_queries() in an output ``out`` with Stretches.room; ``axis`` is its token dimension."""
    return out.narrow(axis, stretches.room[0], stretches.gathered_rows)


def whole_output(out, dense, stretches, axis):
    """The output of the whole sequence, a view of ``out``, which is written to.

    out: of gathered_queries() with Stretches.room, ``axis`` its token dimension. dense(ranges): exact attention of the query
    rows in these (start, stop), end to end, as a tensor of out's layout; called once, or not at all.
    """
    begin, gathered = stretches._first_row, gathered_rows(out, stretches, axis)
    whole = out.narrow(axis, max(0, -begin), stretches.tokens)
    moved = [piece for piece in stretches.pieces() if piece[0] - piece[1] != begin]
    # copied before any is written: a place may hold rows that are still to be moved
    rows = [gathered.narrow(axis, row, count).clone() for _, row, count in moved]
    for (start, _, count), piece in zip(moved, rows, strict=True):
        whole.narrow(axis, start, count).copy_(piece)
    exact = stretches.exact
    if exact:
        computed, at = dense(exact), 0
        for start, stop in exact:
            whole.narrow(axis, start, stop - start).copy_(computed.narrow(axis, at, stop - start))
            at += stop - start
    return whole
