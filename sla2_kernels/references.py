"""Sparse attention of a video and its references in one call, between tokens whose attention stays exact.

The queries of references run sparse like the video's. Their keys are attended by every query (reference_keys "exact"), or routed
together with the video's ("routed"), of each reference at least a few blocks. stretches.py has the blocks.
"""

from itertools import pairwise
from typing import List, Optional  # noqa: UP035  torch 2.6 derives an operator's schema from these only

import torch
from torch import Tensor

from . import router
from .arguments import TOKENS_DIM, check_selection, checked_count, checked_sparsity
from .router import K_BLOCK, Q_BLOCK, block_count
from .selection import RoutedBlocks
from .stretches import Stretches, gathered_queries
from .support import resolve_backend

REFERENCE_KEYS = ("routed", "exact")
REFERENCE_FLOOR = 1  # key blocks of each reference; what it costs: docs/ROUTER_DECISIONS.md, "References"


def are_exact(reference_keys):
    """Whether every query attends all reference keys; raises ValueError for anything but REFERENCE_KEYS."""
    if reference_keys not in REFERENCE_KEYS:
        raise ValueError(f'reference_keys must be "routed" or "exact", got {reference_keys!r}.')
    return reference_keys == "exact"


def selected_with_references(stretches, sparsity, reference_keys="routed", floor=REFERENCE_FLOOR, keep_diagonal=False):
    """Number of key blocks that each query block attends: n of :func:`select_with_references`."""
    return stretches.selected(sparsity, floor, are_exact(reference_keys), keep_diagonal)


def attend_with_references(
    attend,
    q,
    k,
    v,
    stretches,
    *,
    proj_q=None,
    proj_k=None,
    sparsity,
    reference_keys="routed",
    floor=REFERENCE_FLOOR,
    layout="BHND",
    backend="auto",
    keep_diagonal=False,
    query_block=Q_BLOCK,
    **options,
):
    """What ``attend`` returns for the queries of all stretches, in the order of :func:`gathered_queries`; see whole_output().

    Args:
        attend: sla2_attention, fitted_attention or sla_attention, its other arguments bound.
        q, k, v: of the whole sequence. See :func:`sla2_kernels.sla2_attention`.
        stretches: Stretches of that sequence.
        sparsity: share of the routed key blocks that is skipped, 0 to below 1.
        options: for ``attend``, ``room`` among them; the rest as in :func:`select_with_references`.
    """
    q = gathered_queries(q, stretches, TOKENS_DIM[layout])
    routing = {"sparsity": sparsity, "layout": layout, "backend": backend, "keep_diagonal": keep_diagonal}
    routing["query_block"] = query_block
    key_blocks = select_with_references(
        q, k, proj_q, proj_k, stretches, reference_keys=reference_keys, floor=floor, **routing
    )
    return attend(q, k, v, proj_q=proj_q, proj_k=proj_k, key_blocks=RoutedBlocks(key_blocks), **routing, **options)


def select_with_references(
    q,
    k,
    proj_q,
    proj_k,
    stretches,
    *,
    sparsity,
    reference_keys="routed",
    floor=REFERENCE_FLOOR,
    layout="BHND",
    backend="auto",
    keep_diagonal=False,
    query_block=Q_BLOCK,
):
    """The router's choice among the routed key blocks, and all that every query attends.

    Args:
        q: of :func:`gathered_queries`. k: of the whole sequence. Layout, projections and backend as in
            :func:`sla2_kernels.select_key_blocks`.
        sparsity: share of the routed key blocks that is skipped, 0 to below 1.
        reference_keys: "routed", of each reference at least ``floor`` blocks, or "exact": all of them are attended.
        keep_diagonal: each query block always takes the key blocks that hold its own tokens.

    Returns:
        int32 (B, H, T_m, n), ascending; n is :func:`selected_with_references`.

    Raises:
        ValueError: an argument does not fit; the sentence says which and what is expected.
    """
    check_selection(q, k, proj_q, proj_k, layout, backend, query_block)
    exact_references, floor = are_exact(reference_keys), checked_count("floor", floor)
    axis = TOKENS_DIM[layout]
    if k.shape[axis] != stretches.tokens or q.shape[axis] != stretches.gathered_rows:
        raise ValueError(
            f"the stretches are of {stretches.tokens} keys and {stretches.gathered_rows} gathered queries, got {k.shape[axis]} and "
            f"{q.shape[axis]}."
        )
    bounds = [edge for stretch in (stretches.video, *stretches.references) for edge in stretch]
    with torch.no_grad():  # a selection has no derivative, in forward mode either
        return torch.ops.sla2.select_with_references(
            q, k, proj_q, proj_k, bounds, checked_sparsity(sparsity), floor, exact_references, layout == "BHND", backend,
            keep_diagonal, query_block,
        )  # fmt: skip


def _stretches(bounds, tokens):
    video, *references = zip(bounds[::2], bounds[1::2], strict=True)
    return Stretches(tokens, video, tuple(references))


def _always(stretches, always, keep_diagonal, query_block, device):
    """bool (T_m, T_n), or (1, T_n) where nothing depends on the query: the key blocks that a query block attends in any case.

    Nothing is copied to the device, which a CUDA graph that is being captured would refuse.
    """
    forced = torch.ones(1, len(always), dtype=torch.bool, device=device)
    for first, end in _runs(always, False):
        forced[:, first:end] = False
    if not keep_diagonal:
        return forced
    begin, end = _query_ranges(stretches.query_ranges(query_block), query_block, device)
    first = torch.arange(0, len(always) * K_BLOCK, K_BLOCK, device=device, dtype=torch.int32)
    return forced | ((first < end[:, None]) & (first + K_BLOCK > begin[:, None]))


def _runs(values, wanted):
    """(first, end) of each run of ``wanted`` in a list."""
    edges = [False, *(value == wanted for value in values), False]
    places = [place for place, (before, after) in enumerate(pairwise(edges)) if before != after]
    return zip(places[::2], places[1::2], strict=True)


def _query_ranges(ranges, query_block, device):
    """Stretches.query_ranges() as int32 (T_m,) each."""
    runs, counts = [], []
    for begin, _ in ranges:
        if runs and begin == runs[-1] + counts[-1] * query_block:
            counts[-1] += 1
        else:
            runs.append(begin)
            counts.append(1)
    options = {"dtype": torch.int32, "device": device}
    begins = [
        torch.arange(first, first + count * query_block, query_block, **options)
        for first, count in zip(runs, counts, strict=True)
    ]
    begin = torch.cat(begins)
    end = begin + query_block
    for place, (first, last) in enumerate(ranges):
        if last - first != query_block:
            end[place : place + 1].fill_(last)
    return begin, end


def _raise_floors(scores, ranges, floor, highest, lowest):
    """In each range of key blocks the ``floor`` best that are not ``highest`` yet become it; in place."""
    for first, end in ranges:
        part = scores[..., first:end]
        for _ in range(floor):
            best = part.masked_fill(part == highest, lowest).argmax(dim=-1, keepdim=True)
            part.scatter_(-1, best, highest)


def _route(q, k, proj_q, proj_k, always, ranges, floor, count, query_block):
    """int32 (B, H, T_m, count) of BHND views, in plain torch."""
    scores = router.router_scores(q, k, proj_q, proj_k, query_block=query_block).masked_fill(always, torch.inf)
    _raise_floors(scores, ranges, floor, torch.inf, -torch.inf)
    return router.top_k_blocks(scores, count)


@torch.library.custom_op("sla2::select_with_references", mutates_args=())
def _select(
    q: Tensor,
    k: Tensor,
    proj_q: Optional[Tensor],  # noqa: UP045
    proj_k: Optional[Tensor],  # noqa: UP045
    bounds: List[int],  # noqa: UP006
    sparsity: float,
    floor: int,
    exact_references: bool,
    heads_first: bool,
    backend: str,
    keep_diagonal: bool = False,
    query_block: int = Q_BLOCK,
) -> Tensor:
    if not heads_first:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    stretches = _stretches(bounds, k.shape[2])
    always, ranges = stretches.key_blocks(floor, exact_references)
    count = stretches.selected(sparsity, floor, exact_references, keep_diagonal)
    marks = _always(stretches, always, keep_diagonal, query_block, q.device)
    if resolve_backend(backend, q.device, q.dtype, q.shape[3], "16bit").name == "triton":
        from . import triton_backend

        return triton_backend.route_marked(
            q, k, proj_q, proj_k, count, marks,
            lambda *scores: _raise_floors(scores[0], ranges, floor, *scores[1:]), query_block,
        )  # fmt: skip
    return _route(q, k, proj_q, proj_k, marks, ranges, floor, count, query_block)


@_select.register_fake
def _(
    q, k, proj_q, proj_k, bounds, sparsity, floor, exact_references, heads_first, backend, keep_diagonal=False,
    query_block=Q_BLOCK,
):  # fmt: skip
    tokens = 2 if heads_first else 1
    count = _stretches(bounds, k.shape[tokens]).selected(sparsity, floor, exact_references, keep_diagonal)
    rows = (q.shape[0], q.shape[3 - tokens], block_count(q.shape[tokens], query_block), count)
    return q.new_empty(rows, dtype=torch.int32)
