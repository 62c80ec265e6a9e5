"""The top-k key blocks of every query block, without a sort.

One warp per row of integer scores (score.py). The count-th largest is found bit by bit, from the sign down: each step
counts how many scores reach a candidate, until exactly count do. A last walk writes the indices in ascending order; of
equal scores the lowest index wins.
"""

import torch
import triton
import triton.language as tl

from ..router import block_count
from .launch import launch
from .score import LOWEST

CHUNK = 128
MASK_STEP = 128


@triton.jit
def _count(row, threshold, width, CHUNK: tl.constexpr, ABOVE: tl.constexpr):
    """How many scores of a row reach the threshold; ABOVE: exceed it."""
    hits = tl.zeros([CHUNK], dtype=tl.int32)
    for start in range(0, width, CHUNK):
        at = start + tl.arange(0, CHUNK)
        scores = tl.load(row + at, mask=at < width, other=LOWEST)
        hits += (scores > threshold if ABOVE else scores >= threshold).to(tl.int32)
    return tl.sum(hits)


@triton.jit(do_not_specialize=["count", "blocks"])
def _select(scores, selected, unselected, count, blocks, width, mask_stride, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    scores += row * width
    threshold = tl.full([], LOWEST, dtype=tl.int32)
    reached = blocks
    bit = 31
    while (bit >= 0) & (reached != count):
        candidate = threshold ^ (1 << bit)
        reaching = _count(scores, candidate, width, CHUNK, False)
        threshold = tl.where(reaching >= count, candidate, threshold)
        reached = tl.where(reaching >= count, reaching, reached)
        bit -= 1
    ties_wanted = count - _count(scores, threshold, width, CHUNK, True)

    written = tl.zeros([1], dtype=tl.int32)
    ties_seen = tl.zeros([1], dtype=tl.int32)
    for start in range(0, blocks, CHUNK):
        at = start + tl.arange(0, CHUNK)
        row_scores = tl.load(scores + at, mask=at < width, other=LOWEST)
        tie = (row_scores == threshold).to(tl.int32)
        tie_rank = ties_seen + tl.cumsum(tie, axis=0) - tie
        chosen = (row_scores > threshold) | ((tie == 1) & (tie_rank < ties_wanted))
        position = written + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
        tl.store(selected + row * count + position, at, mask=chosen)
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


def select(scores, blocks, count, mask_dtype, plan=None):
    """Integer scores (B * H, T_m, >= T_n) -> int32 (B * H, T_m, count), ascending, and 1 - M_c (B * H, T_m, T_n)."""
    batch_heads, rows, width = scores.shape
    selected = torch.empty(batch_heads, rows, count, dtype=torch.int32, device=scores.device)
    unselected = new_mask((batch_heads, rows), blocks, mask_dtype, scores.device, torch.empty)
    launch(
        plan, _select, (batch_heads * rows,), scores, selected, unselected, count, blocks, width, unselected.stride(1),
        CHUNK=CHUNK, options={"num_warps": 1},
    )  # fmt: skip
    return selected, unselected


def unselected_mask(selected, blocks, dtype):
    """1 - M_c (B * H, T_m, T_n) of a selection (B * H, T_m, count) that was made elsewhere."""
    unselected = new_mask(selected.shape[:2], blocks, dtype, selected.device)
    return unselected.fill_(1.0).scatter_(-1, selected.long(), 0.0)
