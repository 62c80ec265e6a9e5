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
from .numerics import from_ordered_int, ordered_int
from .score import INT32_MAX, INT32_MIN, SCORES_STEP

CHUNK = SCORES_STEP
MASK_STEP = 128
# So many steps halve the distance between two numbers: 11 tell 2,000 typical scores apart. Later ones halve that between
# their integers, which ends whatever the scores are.
HALVINGS = tl.constexpr(16)


@triton.jit
def _range(row, blocks, width, CHUNK: tl.constexpr):
    """(smallest, largest below INT32_MAX, how many are INT32_MAX) of a row's scores."""
    least = tl.full([CHUNK], INT32_MAX, dtype=tl.int32)
    largest = tl.full([CHUNK], INT32_MIN, dtype=tl.int32)
    own = tl.zeros([CHUNK], dtype=tl.int32)
    for start in range(0, width, CHUNK):
        at = start + tl.arange(0, CHUNK)
        scores = tl.load(row + at)  # [CHUNK]
        least = tl.minimum(least, tl.where(at < blocks, scores, INT32_MAX))
        largest = tl.maximum(largest, tl.where(scores == INT32_MAX, INT32_MIN, scores))
        own += (scores == INT32_MAX).to(tl.int32)
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
    """An integer between low and high, which must not be neighbours: at first that of the number halfway."""
    halfway = ordered_int(from_ordered_int(low) * 0.5 + from_ordered_int(high) * 0.5)
    middle = (low & high) + ((low ^ high) >> 1)
    return tl.minimum(tl.maximum(tl.where(halvings < HALVINGS, halfway, middle), low + 1), high - 1)


@triton.jit(do_not_specialize=["count", "blocks"])
def _select(scores, selected, unselected, count, blocks, width, mask_stride, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    scores += row * width
    least, largest, own = _range(scores, blocks, width, CHUNK)
    enough_own = own >= count
    # invariant: at least count scores reach low, fewer reach high
    low = tl.where(enough_own, INT32_MAX, least)
    high = tl.where(enough_own, INT32_MAX, largest + 1)
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
    # how many of the scores equal to low are taken
    ties_wanted = tl.where(reach_low == count, count, count - reach_high)

    written = tl.zeros([1], dtype=tl.int32)
    ties_seen = tl.zeros([1], dtype=tl.int32)
    for start in range(0, blocks, CHUNK):
        at = start + tl.arange(0, CHUNK)
        row_scores = tl.load(scores + at)  # [CHUNK]
        tie = (row_scores == low).to(tl.int32)
        tie_rank = ties_seen + tl.cumsum(tie, axis=0) - tie
        chosen = (row_scores > low) | ((tie == 1) & (tie_rank < ties_wanted))
        position = written + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
        tl.store(selected + row * count + position, at, mask=chosen)
        if unselected is not None:
            # zeros past the last block too, so that a product can walk the mask in whole steps
            left_out = tl.where(chosen | (at >= blocks), 0.0, 1.0)
            tl.store(unselected + row * mask_stride + at, left_out, mask=at < mask_stride)
        written += tl.sum(chosen.to(tl.int32), axis=0)
        ties_seen += tl.sum(tie, axis=0)


def mask_width(blocks):
    """Places of a row of the mask in memory: whole steps of MASK_STEP."""
    return block_count(blocks, MASK_STEP) * MASK_STEP


def new_mask(rows_shape, blocks, dtype, device, make=torch.zeros):
    """An empty 1 - M_c, (*rows_shape, T_n): a view of rows that have zeros up to the next MASK_STEP.

    A product can then walk it in whole steps. make: torch.empty where a kernel writes those zeros.
    """
    return make(*rows_shape, mask_width(blocks), dtype=dtype, device=device)[..., :blocks]


def select(scores, blocks, selected, mask_dtype):
    """The top-k: fills selected, int32 (B * H, T_m, count), ascending; returns 1 - M_c (B * H, T_m, T_n).

    scores: of score.py, int32 (B * H, T_m, T_n padded to whole SCORES_STEPs). mask_dtype: None makes no mask, returns None.
    """
    batch_heads, rows, width = scores.shape
    unselected = None
    if mask_dtype is not None:
        unselected = new_mask((batch_heads, rows), blocks, mask_dtype, scores.device, torch.empty)
    launch(
        _select, (batch_heads * rows,), scores, selected, unselected, selected.shape[2], blocks, width,
        0 if unselected is None else unselected.stride(1), CHUNK=CHUNK, options={"num_warps": 1},
    )  # fmt: skip
    return unselected


def unselected_mask(selected, blocks, dtype):
    """1 - M_c (B * H, T_m, T_n) of a selection (B * H, T_m, count) that was made elsewhere."""
    unselected = new_mask(selected.shape[:2], blocks, dtype, selected.device)
    return unselected.fill_(1.0).scatter_(-1, selected.long(), 0.0)
