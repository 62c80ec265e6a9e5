"""Softmax attention of a few query rows taken apart by key block: what training a router needs of it.

For a row r and a key block j, with m_r the row's largest score: mass_rj = sum over the block of exp(S_rt - m_r), and value_rj the
same sum of exp(S_rt - m_r) V_t. K is taken as it is: that every key loses the same mean changes no weight.

Products of 16-bit numbers are exact in float32. P, below the block's own maximum, is the sum of two 16-bit numbers, so that
value_rj is exact to 2^-17 of each weight; in float16 to 2^-25 of the block's largest where that is more.

_largest_scores: one program per (row tile, split of the key blocks, pair). _key_block_sums: one program per (row tile, few key
blocks, pair); row tiles run fastest, so that K and V come from L2. Writing the values, 512 bytes a row and block, is most of it.
"""

import math

import torch
import triton
import triton.language as tl

from ..router import K_BLOCK, block_count
from .configs import KEY_BLOCK_SUMS
from .launch import launch
from .numerics import NO_SCORE
from .planes import KEY_BLOCK, load_tile, tile_rows


@triton.jit
def _scores(queries, keys, j, d, k_stride_n, k_stride_d, k_tokens, scale_log2):
    """log2 of a key block's weights [rows, KEY_BLOCK]; NO_SCORE past the end of the keys."""
    tokens = tile_rows(j, KEY_BLOCK)
    valid = (tokens < k_tokens)[None, :]
    k_tile = tl.load(keys + tokens[None, :] * k_stride_n + d[:, None] * k_stride_d, mask=valid, other=0.0)
    return tl.where(valid, tl.dot(queries, k_tile) * scale_log2, NO_SCORE)


@triton.jit(do_not_specialize=["rows", "k_tokens", "per_split"])
def _largest_scores(
    q, k, largest, k_stride_h, k_stride_n, k_stride_d, rows, k_tokens, per_split, scale_log2,
    D: tl.constexpr, TILE_M: tl.constexpr,
):  # fmt: skip
    split, pair = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, d = tile_rows(tl.program_id(0), TILE_M), tl.arange(0, D)
    queries = load_tile(q + pair * rows * D, row, d, D, 1, rows)  # [TILE_M, D]
    keys = k + pair * k_stride_h
    found = tl.full([TILE_M], NO_SCORE, dtype=tl.float32)
    first = split * per_split
    for j in range(first, tl.minimum(first + per_split, tl.cdiv(k_tokens, KEY_BLOCK))):
        scores = _scores(queries, keys, j, d, k_stride_n, k_stride_d, k_tokens, scale_log2)
        found = tl.maximum(found, tl.max(scores, axis=1))
    at = largest + (split * tl.num_programs(2) + pair) * rows + row
    tl.store(at, found, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "k_tokens", "per_program", "mass_stride_r"])
def _key_block_sums(
    q, k, v, largest, mass, value, k_stride_h, k_stride_n, k_stride_d, v_stride_h, v_stride_n, v_stride_d,
    mass_stride_h, mass_stride_r, rows, k_tokens, per_program, scale_log2, D: tl.constexpr, TILE_M: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(2).to(tl.int64)
    row, d = tile_rows(tl.program_id(0), TILE_M), tl.arange(0, D)
    inside = row < rows
    queries = load_tile(q + pair * rows * D, row, d, D, 1, rows)  # [TILE_M, D]
    row_max = tl.load(largest + pair * rows + row, mask=inside, other=0.0)  # [TILE_M]
    keys, values = k + pair * k_stride_h, v + pair * v_stride_h
    masses = mass + pair * mass_stride_h + row * mass_stride_r
    first = tl.program_id(1) * per_program
    for j in range(first, tl.minimum(first + per_program, tl.cdiv(k_tokens, KEY_BLOCK))):
        scores = _scores(queries, keys, j, d, k_stride_n, k_stride_d, k_tokens, scale_log2)
        v_tile = load_tile(values, tile_rows(j, KEY_BLOCK), d, v_stride_n, v_stride_d, k_tokens)  # [KEY_BLOCK, D]
        # float16 has no small numbers, so P is first below the block's own maximum
        block_max = tl.max(scores, axis=1)
        p = tl.exp2(scores - block_max[:, None])
        share = tl.exp2(block_max - row_max)
        high = p.to(v_tile.dtype)
        low = (p - high.to(tl.float32)).to(v_tile.dtype)
        sums = tl.dot(high, v_tile, tl.dot(low, v_tile))
        tl.store(masses + j, tl.sum(p, axis=1) * share, mask=inside)
        at = value + ((pair + j * tl.num_programs(2)) * rows + row)[:, None] * D + d
        tl.store(at, sums * share[:, None], mask=inside[:, None])


def largest_scores(q, k, scale, config=KEY_BLOCK_SUMS):
    """float32 (G, rows): a row's largest score, times log2 e. q (G, rows, D), contiguous, and k (G, M, D) in one 16-bit format."""
    (pairs, rows, head_dim), blocks = q.shape, block_count(k.shape[1], K_BLOCK)
    tiles = block_count(rows, config.tile_m)
    per_split = block_count(blocks, min(blocks, block_count(config.programs, tiles * pairs)))
    splits = block_count(blocks, per_split)
    largest = torch.empty(splits, pairs, rows, dtype=torch.float32, device=q.device)
    launch(
        _largest_scores, (tiles, splits, pairs), q, k, largest, *k.stride(), rows, k.shape[1], per_split,
        scale * math.log2(math.e), D=head_dim, TILE_M=config.tile_m, options=config.options,
    )  # fmt: skip
    return largest.amax(dim=0)


def key_block_sums(q, k, v, largest, scale, mass, value, config=KEY_BLOCK_SUMS):
    """Writes mass, float32 (G, rows, T_n) with adjacent key blocks, and value, float32 (T_n, G, rows, D), contiguous.

    q (G, rows, D), contiguous, and k, v (G, M, D) in one 16-bit format; largest: of largest_scores().
    """
    pairs, rows, head_dim = q.shape
    blocks = block_count(k.shape[1], K_BLOCK)
    launch(
        _key_block_sums, (block_count(rows, config.tile_m), block_count(blocks, config.blocks), pairs),
        q, k, v, largest, mass, value, *k.stride(), *v.stride(), mass.stride(0), mass.stride(1), rows, k.shape[1],
        config.blocks, scale * math.log2(math.e), D=head_dim, TILE_M=config.tile_m, options=config.options,
    )  # fmt: skip
