"""The top-k key blocks of every query block, without a sort.

One warp per row. The count-th largest score is found bit by bit: 32 times it counts how many scores reach a candidate.
A second walk writes the indices above it in ascending order; of equal scores the lowest index wins.
"""

import torch
import triton
import triton.language as tl

CHUNK = 512
MASK_STEP = 128


@triton.jit
def _sortable(x):
    """float32 -> uint32 in the same order (-0.0 counts as 0.0)."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    flipped = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return flipped.to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit(do_not_specialize=["count", "blocks"])
def _select(scores, selected, unselected, count, blocks, mask_stride, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, CHUNK)
    scores += row * blocks

    threshold = tl.zeros([1], dtype=tl.uint32)
    for bit in range(32):
        candidate = threshold | (tl.full([1], 1, tl.uint32) << (31 - bit))
        reached = tl.zeros([1], dtype=tl.int32)
        for start in range(0, blocks, CHUNK):
            inside = start + lanes < blocks
            keys = _sortable(tl.load(scores + start + lanes, mask=inside, other=0.0))
            reached += tl.sum(((keys >= candidate) & inside).to(tl.int32), axis=0)
        threshold = tl.where(reached >= count, candidate, threshold)

    above = tl.zeros([1], dtype=tl.int32)
    for start in range(0, blocks, CHUNK):
        inside = start + lanes < blocks
        keys = _sortable(tl.load(scores + start + lanes, mask=inside, other=0.0))
        above += tl.sum(((keys > threshold) & inside).to(tl.int32), axis=0)
    ties_wanted = count - above

    written = tl.zeros([1], dtype=tl.int32)
    ties_seen = tl.zeros([1], dtype=tl.int32)
    for start in range(0, blocks, CHUNK):
        inside = start + lanes < blocks
        keys = _sortable(tl.load(scores + start + lanes, mask=inside, other=0.0))
        tie = ((keys == threshold) & inside).to(tl.int32)
        tie_rank = ties_seen + tl.cumsum(tie, axis=0) - tie
        chosen = ((keys > threshold) & inside) | ((tie == 1) & (tie_rank < ties_wanted))
        position = written + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
        tl.store(selected + row * count + position, start + lanes, mask=chosen)
        tl.store(unselected + row * mask_stride + start + lanes, tl.where(chosen, 0.0, 1.0), mask=inside)
        written += tl.sum(chosen.to(tl.int32), axis=0)
        ties_seen += tl.sum(tie, axis=0)


def new_mask(rows_shape, blocks, dtype, device):
    """A 1 - M_c to be filled in, (*rows_shape, T_n): a view of rows with zeros up to the next MASK_STEP.

    A product can then walk it in whole steps.
    """
    padded = triton.cdiv(blocks, MASK_STEP) * MASK_STEP
    return torch.zeros(*rows_shape, padded, dtype=dtype, device=device)[..., :blocks]


def select(scores, count, mask_dtype):
    """scores (B * H, T_m, T_n) -> int32 indices (B * H, T_m, count), ascending, and 1 - M_c (B * H, T_m, T_n)."""
    batch_heads, rows, blocks = scores.shape
    selected = torch.empty(batch_heads, rows, count, dtype=torch.int32, device=scores.device)
    unselected = new_mask((batch_heads, rows), blocks, mask_dtype, scores.device)
    _select[(batch_heads * rows,)](
        scores, selected, unselected, count, blocks, unselected.stride(1), CHUNK=CHUNK, num_warps=1
    )
    return selected, unselected


def unselected_mask(selected, blocks, dtype):
    """1 - M_c (B * H, T_m, T_n) of a selection (B * H, T_m, count) that was made elsewhere."""
    unselected = new_mask(selected.shape[:2], blocks, dtype, selected.device)
    return unselected.fill_(1.0).scatter_(-1, selected.long(), 0.0)
