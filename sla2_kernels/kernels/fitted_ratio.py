"""A mixing ratio per head, fitted on a few query rows whose dense attention is computed.

Of each sampled row the ratio needs dense attention O, softmax attention over its selected key blocks O_s, and the linear
branch O_l: least squares over the rows of a head give sum <O - O_l, O_s - O_l> / sum |O_s - O_l|^2.

_row_sums: one program per (head, split of the key blocks), all sampled rows together. Each row is in the tile twice, once
over the key blocks that it selected and once over the others, which makes the 64 rows of Hopper's matrix instructions.
Neighbouring programs read the same tokens of neighbouring heads, which lie beside each other in a video model's K and V.
_row_products: one program per (sampled row, head) adds up the splits and takes O_l from the sums of the linear branch.
_ratio: one program per head adds up the rows.

Fewer rows would not be faster: the tile's 64 rows are the least that the instructions take, and reading K and V is most of it.
"""

import torch
import triton
import triton.language as tl

from ..router import block_count
from .launch import launch
from .numerics import NO_SCORE, is_finite, phi_numerator
from .pack import from_register_order_of_channels
from .planes import KEY_BLOCK, load_tile, plane_of, tile_at, tile_rows

MIN_BLOCKS = 8  # key blocks of one program: below that its partial sums outweigh what it reads
PRODUCTS = tl.constexpr(4)  # numbers of a sampled row: two products, its selected mass, whether that is finite


@triton.jit(do_not_specialize=["heads", "k_tokens", "per_split"])
def _row_sums(
    q, k, v, unselected, rows, sums, weights,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d, mask_stride_h, mask_stride_m,
    heads, k_tokens, per_split, scale_log2,
    D: tl.constexpr, ROWS: tl.constexpr, QUERY_BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    bh, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    PART: tl.constexpr = D // PARTS
    twice, d, part = tl.arange(0, 2 * ROWS), tl.arange(0, D), tl.arange(0, PART)
    over_selected = twice < ROWS
    row = tl.load(rows + twice % ROWS).to(tl.int64)  # [2 ROWS]
    q_plane = plane_of(q, bh, heads, q_stride_b, q_stride_h)
    queries = tl.load(tile_at(q_plane, row, d, q_stride_n, q_stride_d))  # [2 ROWS, D]
    keys = plane_of(k, bh, heads, k_stride_b, k_stride_h)
    values = plane_of(v, bh, heads, v_stride_b, v_stride_h)
    unselected += bh * mask_stride_h + row // QUERY_BLOCK * mask_stride_m  # [2 ROWS]

    first = tl.zeros([2 * ROWS, PART], dtype=tl.float32)
    last = first
    row_sum = tl.zeros([2 * ROWS], dtype=tl.float32)
    row_max = tl.full([2 * ROWS], NO_SCORE, dtype=tl.float32)
    begin = split * per_split
    for j in range(begin, tl.minimum(begin + per_split, tl.cdiv(k_tokens, KEY_BLOCK))):
        tokens = tile_rows(j, KEY_BLOCK)
        valid = tokens < k_tokens
        k_at = keys + tokens * k_stride_n + d[:, None] * k_stride_d
        k_tile = tl.load(k_at, mask=valid[None, :], other=0.0)  # [D, KEY_BLOCK]
        v_first = load_tile(values, tokens, part, v_stride_n, v_stride_d, k_tokens)  # [KEY_BLOCK, PART]
        counts = (tl.load(unselected + j) == 0) == over_selected  # [2 ROWS]
        scores = tl.where(valid[None, :], tl.dot(queries, k_tile, input_precision="tf32x3"), NO_SCORE)
        new_max = tl.where(counts, tl.maximum(row_max, tl.max(scores, axis=1) * scale_log2), row_max)
        # where the block does not count for a row, its P is 2 to the power of almost minus infinity
        p = tl.exp2(scores * scale_log2 - tl.where(counts, new_max, 0.0 - NO_SCORE)[:, None])
        correction = tl.exp2(row_max - new_max)
        row_max = new_max
        row_sum = row_sum * correction + tl.sum(p, axis=1)
        p = p.to(v.dtype.element_ty)
        first = tl.dot(p, v_first, first * correction[:, None], input_precision="tf32x3")
        if PARTS == 2:
            v_last = load_tile(values, tokens, PART + part, v_stride_n, v_stride_d, k_tokens)
            last = tl.dot(p, v_last, last * correction[:, None], input_precision="tf32x3")

    at = (bh * tl.num_programs(1) + split) * (2 * ROWS) + twice
    tl.store(sums + at[:, None] * D + part, first)
    if PARTS == 2:
        tl.store(sums + at[:, None] * D + PART + part, last)
    tl.store(weights + at * 2, row_max)
    tl.store(weights + at * 2 + 1, row_sum)


@triton.jit
def _merged(sums, weights, at, splits, D: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr):
    """(sum of p V [D], sum of p, maximum) of one row over all splits; ``at`` is its place in the first one."""
    d, step = tl.arange(0, D), tl.arange(0, STEP)
    highest = tl.full([STEP], NO_SCORE, dtype=tl.float32)
    for start in range(0, splits, STEP):
        here = at + (start + step) * (2 * ROWS)
        highest = tl.maximum(highest, tl.load(weights + here * 2, mask=start + step < splits, other=NO_SCORE))
    row_max = tl.max(highest, axis=0)
    total = tl.zeros([D], dtype=tl.float32)
    norm = tl.zeros([STEP], dtype=tl.float32)
    for start in range(0, splits, STEP):
        here, inside = at + (start + step) * (2 * ROWS), start + step < splits
        factor = tl.exp2(tl.load(weights + here * 2, mask=inside, other=NO_SCORE) - row_max)  # [STEP]
        norm += tl.load(weights + here * 2 + 1, mask=inside, other=0.0) * factor
        part = tl.load(sums + here[:, None] * D + d, mask=inside[:, None], other=0.0)  # [STEP, D]
        total += tl.sum(part * factor[:, None], axis=0)
    return total, tl.sum(norm, axis=0), row_max


@triton.jit(do_not_specialize=["heads", "first_head", "splits", "q_blocks"])
def _row_products(
    q, rows, sums, weights, query_sums, dense, products, q_stride_b, q_stride_h, q_stride_n, q_stride_d,
    heads, first_head, splits, q_blocks,
    D: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, QUERY_BLOCK: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    sample, slot = tl.program_id(0), tl.program_id(1).to(tl.int64)
    bh = first_head + slot
    d = tl.arange(0, D)
    at = bh * splits * (2 * ROWS) + sample
    own, own_norm, own_max = _merged(sums, weights, at, splits, D, ROWS, STEP)
    other, other_norm, other_max = _merged(sums, weights, at + ROWS, splits, D, ROWS, STEP)
    highest = tl.maximum(own_max, other_max)
    own_share, other_share = tl.exp2(own_max - highest), tl.exp2(other_max - highest)
    norm = own_norm * own_share + other_norm * other_share
    out = (own * own_share + other * other_share) / norm  # [D], dense attention
    tl.store(dense + (bh * ROWS + sample) * D + d, out)

    row = tl.load(rows + sample).to(tl.int64)
    q_at = plane_of(q, bh, heads, q_stride_b, q_stride_h) + row * q_stride_n + d * q_stride_d
    phi = phi_numerator(tl.load(q_at).to(tl.float32), 0)  # [D]
    query_sums += (slot * q_blocks + row // QUERY_BLOCK) * ((D + 1) * D)
    h = tl.load(query_sums + d[:, None] * D + d).to(tl.float32)  # [D, D]
    z = tl.load(query_sums + D * D + d).to(tl.float32)  # [D]
    o_linear = tl.sum(phi[:, None] * h, axis=0) / tl.sum(phi * z, axis=0)  # [D]
    if ORDER > 0:
        # H's columns stay where they are, so that its loads stay wide
        o_linear = from_register_order_of_channels(o_linear, D, ORDER)
    to_sparse = own / own_norm - o_linear
    cross = tl.sum((out - o_linear) * to_sparse, axis=0)
    square = tl.sum(to_sparse * to_sparse, axis=0)
    # a row that is not finite says nothing about the ratio
    sound = is_finite(cross) & is_finite(square)
    mass = own_norm * own_share / norm
    has_mass = is_finite(mass)
    products += (bh * ROWS + sample) * PRODUCTS
    tl.store(products, tl.where(sound, cross, 0.0))
    tl.store(products + 1, tl.where(sound, square, 0.0))
    tl.store(products + 2, tl.where(has_mass, mass, 0.0))
    tl.store(products + 3, tl.where(has_mass, 1.0, 0.0))


@triton.jit(do_not_specialize=["first_head", "fitted", "q_blocks"])
def _ratio(products, ratio, block_ratio, first_head, fitted, q_blocks, ROWS: tl.constexpr, STEP: tl.constexpr):
    bh = first_head + tl.program_id(0).to(tl.int64)
    r = tl.arange(0, ROWS)
    at, taken = products + (bh * ROWS + r) * PRODUCTS, r < fitted
    cross = tl.sum(tl.load(at, mask=taken, other=0.0), axis=0)
    square = tl.sum(tl.load(at + 1, mask=taken, other=0.0), axis=0)
    mass = tl.sum(tl.load(at + 2, mask=taken, other=0.0), axis=0)
    finite = tl.sum(tl.load(at + 3, mask=taken, other=0.0), axis=0)
    # where the branches agree any ratio is right: it is then the rows' mean selected mass, which is what a ratio stands for
    found = tl.where(square > 0, cross / square, mass / tl.maximum(finite, 1.0))
    found = tl.minimum(tl.maximum(found, 0.0), 1.0)
    tl.store(ratio + bh, found)
    for start in range(0, q_blocks, STEP):
        i = start + tl.arange(0, STEP)
        tl.store(block_ratio + bh * q_blocks + i, tl.zeros([STEP], dtype=tl.float32) + found, mask=i < q_blocks)


def _splits(batch_heads, blocks, programs):
    """(programs per head, key blocks of each), at most so many programs in all, or one per head."""
    wanted = max(1, min(programs // batch_heads, blocks // MIN_BLOCKS))
    per_split = block_count(blocks, wanted)
    return block_count(blocks, per_split), per_split


class FittedRatio:
    """A ratio per video and head that is fitted while a call runs: first attend(), then fit() for each group of heads."""

    def __init__(self, sample, block_ratio, query_block):
        """sample: a Sample. block_ratio: float32 (B * H, T_m), to be filled; T_m blocks of ``query_block`` rows."""
        self._sample, self._block_ratio, self._query_block = sample, block_ratio, query_block
        self._sums = self._weights = self._products = None

    def attend(self, q, k, v, unselected, *, scale_log2, config):
        """The sampled rows over all keys, in two parts. q (B, H, N, D); k, v (B, H, M, D); unselected (B * H, T_m, T_n)."""
        (batch, heads, _, head_dim), rows = q.shape, self._sample.rows
        splits, per_split = _splits(batch * heads, unselected.shape[2], config.programs)
        shape = batch * heads, splits, 2 * len(rows)
        self._sums = torch.empty(*shape, head_dim, dtype=torch.float32, device=q.device)
        self._weights = torch.empty(*shape, 2, dtype=torch.float32, device=q.device)
        self._products = torch.empty(batch * heads, len(rows), PRODUCTS.value, dtype=torch.float32, device=q.device)
        launch(
            _row_sums, (batch * heads, splits), q, k, v, unselected, rows, self._sums, self._weights,
            *q.stride(), *k.stride(), *v.stride(), unselected.stride(0), unselected.stride(1),
            heads, k.shape[2], per_split, scale_log2, D=head_dim, ROWS=len(rows), QUERY_BLOCK=self._query_block,
            PARTS=config.parts if head_dim == 128 else 1, options=config.options,
        )  # fmt: skip

    def fit(self, q, query_sums, group, *, order):
        """Fills the ratios, and the Sample's dense rows and ratios, of slice ``group``.

        query_sums: H_i and Z_i (G, T_m, (D + 1) * D).
        order: how many of H_i's columns change places with each other; 0: none.
        """
        rows, slots, q_blocks = self._sample.rows, group.stop - group.start, query_sums.shape[1]
        launch(
            _row_products, (len(rows), slots), q, rows, self._sums, self._weights, query_sums,
            self._sample.dense, self._products, *q.stride(), q.shape[1], group.start, self._sums.shape[1], q_blocks,
            D=q.shape[3], ROWS=len(rows), STEP=16, QUERY_BLOCK=self._query_block, ORDER=order, options={"num_warps": 4},
        )  # fmt: skip
        launch(
            _ratio, (slots,), self._products, self._sample.ratio, self._block_ratio, group.start, self._sample.fitted,
            q_blocks, ROWS=len(rows), STEP=256, options={"num_warps": 1},
        )  # fmt: skip
