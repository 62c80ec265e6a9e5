"""The top-k key blocks of every query block, without a sort.

One warp per row of integer scores (score.py). The count-th largest lies between a score that enough reach and one that
too few do: each step counts how many reach a candidate between the two, until exactly count do. A last walk writes the
indices in ascending order; of equal scores the lowest index wins.
"""

import torch
import triton
import triton.language as tl

from ..router import block_count
from .launch import launch
from .score import HIGHEST, LOWEST, SCORES_STEP, ordered, unordered

CHUNK = SCORES_STEP
MASK_STEP = 128
# of the distance as numbers, 11 of which tell 2000 usual scores apart; then as integers, which comes to an end
HALVINGS = tl.constexpr(16)


@triton.jit
def _range(row, blocks, width, CHUNK: tl.constexpr):
    """(least, largest but for HIGHEST, how many are HIGHEST) of a row's scores."""
    least = tl.full([CHUNK], HIGHEST, dtype=tl.int32)
    largest = tl.full([CHUNK], LOWEST, dtype=tl.int32)
    own = tl.zeros([CHUNK], dtype=tl.int32)
    for start in range(0, width, CHUNK):
        at = start + tl.arange(0, CHUNK)
        scores = tl.load(row + at)
        least = tl.minimum(least, tl.where(at < blocks, scores, HIGHEST))
        largest = tl.maximum(largest, tl.where(scores == HIGHEST, LOWEST, scores))
        own += (scores == HIGHEST).to(tl.int32)
    return tl.min(least, axis=0), tl.max(largest, axis=0), tl.sum(own, axis=0)


@triton.jit
def _reaching(row, candidate, width, CHUNK: tl.constexpr):
    """How many scores of a row reach the candidate."""
    hits = tl.zeros([CHUNK], dtype=tl.int32)
    for start in range(0, width, CHUNK):
        hits += (tl.load(row + start + tl.arange(0, CHUNK)) >= candidate).to(tl.int32)
    return tl.sum(hits, axis=0)


@triton.jit
def _between(low, high, halvings):
    """An integer above low and below high, which must not be neighbours: at first that of the number halfway."""
    halfway = ordered(unordered(low) * 0.5 + unordered(high) * 0.5)
    middle = (low & high) + ((low ^ high) >> 1)
    return tl.minimum(tl.maximum(tl.where(halvings < HALVINGS, halfway, middle), low + 1), high - 1)


@triton.jit(do_not_specialize=["count", "blocks"])
def _select(scores, selected, unselected, count, blocks, width, mask_stride, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    scores += row * width
    least, largest, own = _range(scores, blocks, width, CHUNK)
    enough_own = own >= count
    # count at least reach low, fewer reach high
    low = tl.where(enough_own, HIGHEST, least)
    high = tl.where(enough_own, HIGHEST, largest + 1)
    reach_low = tl.where(enough_own, count, blocks)
    reach_high = own
    halvings = 0
    while (reach_low != count) & (high - 1 > low):
        candidate = _between(low, high, halvings)
        reaching = _reaching(scores, candidate, width, CHUNK)
        enough = reaching >= count
        low, reach_low = tl.where(enough, candidate, low), tl.where(enough, reaching, reach_low)
        high, reach_high = tl.where(enough, high, candidate), tl.where(enough, reach_high, reaching)
        halvings += 1
    # of the scores equal to low
    ties_wanted = tl.where(reach_low == count, count, count - reach_high)

    written = tl.zeros([1], dtype=tl.int32)
    ties_seen = tl.zeros([1], dtype=tl.int32)
    for start in range(0, blocks, CHUNK):
        at = start + tl.arange(0, CHUNK)
        row_scores = tl.load(scores + at)
        tie = (row_scores == low).to(tl.int32)
        tie_rank = ties_seen + tl.cumsum(tie, axis=0) - tie
        chosen = (row_scores > low) | ((tie == 1) & (tie_rank < ties_wanted))
        position = written + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
        tl.store(selected + row * count + position, at, mask=chosen)
        if unselected is not None:
            # zeros behind the last block too: a product walks the mask in whole steps
            tl.store(
                unselected + row * mask_stride + at, tl.where(chosen | (at >= blocks), 0.0, 1.0), mask=at < mask_stride
            )
        written += tl.sum(chosen.to(tl.int32), axis=0)
        ties_seen += tl.sum(tie, axis=0)


def mask_width(blocks):
    """Places of a row of the mask in memory: whole steps of MASK_STEP."""
    return block_count(blocks, MASK_STEP) * MASK_STEP


def new_mask(rows_shape, blocks, dtype, device, make=torch.zeros):
    """A 1 - M_c to be filled in, (*rows_shape, T_n): a view of rows with zeros up to the next MASK_STEP.

    A product can then walk it in whole steps. make: torch.empty where the zeros are written later.
    """
    return make(*rows_shape, mask_width(blocks), dtype=dtype, device=device)[..., :blocks]


def select(scores, blocks, selected, mask_dtype, plan=None):
    """The top-k: fills selected, int32 (B * H, T_m, count), ascending; returns 1 - M_c (B * H, T_m, T_n).

    scores: of score.py, int32 (B * H, T_m, T_n padded to whole SCORES_STEPs). mask_dtype: None makes no mask, returns None.
    """
    batch_heads, rows, width = scores.shape
    unselected = None
    if mask_dtype is not None:
        unselected = new_mask((batch_heads, rows), blocks, mask_dtype, scores.device, torch.empty)
    launch(
        plan, _select, (batch_heads * rows,), scores, selected, unselected, selected.shape[2], blocks, width,
        0 if unselected is None else unselected.stride(1), CHUNK=CHUNK, options={"num_warps": 1},
    )  # fmt: skip
    return unselected


def unselected_mask(selected, blocks, dtype):
    """1 - M_c (B * H, T_m, T_n) of a selection (B * H, T_m, count) that was made elsewhere."""
    unselected = new_mask(selected.shape[:2], blocks, dtype, selected.device)
    return unselected.fill_(1.0).scatter_(-1, selected.long(), 0.0)
