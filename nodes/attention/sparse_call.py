"""One self-attention call of a video model: the queries of the video and of references run sparse, those of text and sound dense.

sla2_kernels/exact_ends.py and references.py are the same without ComfyUI; this file adds ComfyUI's layouts and the
fitted ratio.
"""

import functools
from dataclasses import dataclass

import torch

from ...sla2_kernels import K_BLOCK, sla2_attention
from ...sla2_kernels.exact_ends import attend_video, with_exact_rows
from ...sla2_kernels.exact_rows import exact_rows, takes_exact_rows
from ...sla2_kernels.fitted_attention import call_errors, fitted_attention, sample_rows
from ...sla2_kernels.forced_blocks import forced_block_counts
from ...sla2_kernels.references import REFERENCE_KEYS, attend_with_references, selected_with_references
from ...sla2_kernels.router import block_count
from ...sla2_kernels.sla_v1 import sla_attention
from ...sla2_kernels.stretches import Stretches, gathered_rows, whole_output
from ..compat.override_arguments import by_name, with_queries
from .video_tokens import ExactTokens


@dataclass(frozen=True)
class VideoPart:
    """The video's own queries and keys of one call, as views, and all keys and values. ``layout`` is the operator's."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    video_k: torch.Tensor
    layout: str

    @property
    def token_axis(self):
        return 1 if self.layout == "BNHD" else 2

    @property
    def queries_are_keys(self):
        """False if queries of one frame attend keys of all frames."""
        return self.q.shape[self.token_axis] == self.video_k.shape[self.token_axis]


def video_part(request, exact):
    """VideoPart of an AttentionCall with these ExactTokens."""
    layout = "BNHD" if request.flat_output else "BHND"
    q, k, v = request.q, request.k, request.v
    queries = q[:, exact.query_prefix : q.shape[1] - exact.query_suffix]
    keys = k[:, exact.key_prefix : k.shape[1] - exact.key_suffix]
    views = (queries, k, v, keys)
    return VideoPart(*(views if request.flat_output else (t.transpose(1, 2) for t in views)), layout)


def stretches_of(request, exact):
    """Stretches of a call whose references run sparse beside the video, else None."""
    if not exact.references:
        return None
    return Stretches(request.tokens, (exact.query_prefix, request.tokens - exact.query_suffix), exact.references)


@dataclass(frozen=True)
class ExactRows:
    """Query rows of the video that a fitted call also computed exactly: its output is judged by those it did not fit.

    rows: int32 (R,). dense: float32 (B, H, R, D). layout: of the output.
    """

    rows: torch.Tensor
    dense: torch.Tensor
    layout: str

    def errors(self, out):
        """call_errors() of a call's output ``out``."""
        return call_errors(out.transpose(1, 2) if self.layout == "BNHD" else out, self.dense, self.rows)


def sparse_video(part, exact, weights, *, sparsity, precision, scale, call_ratio=None):
    """(out, ratio, kept, keys, ExactRows or None): the video's queries attend ``kept`` of ``keys`` keys exactly.

    out: with room for the rows of the other queries; own_rows() are the video's. ratio: of each query row, float32
    (B, H, N). weights: CallWeights. call_ratio: CallRatio where the ratio is fitted; a call that keeps all blocks has nothing
    to fit.
    """
    keys = part.k.shape[part.token_axis]
    forced = forced_block_counts(keys, exact.key_prefix, exact.key_suffix)
    attend = functools.partial(
        attend_video,
        q=part.q,
        k=part.k,
        v=part.v,
        key_prefix=exact.key_prefix,
        key_suffix=exact.key_suffix,
        proj_q=weights.proj_q,
        proj_k=weights.proj_k,
        sparsity=sparsity,
        precision=precision,
        scale=scale,
        layout=part.layout,
        room=(exact.query_prefix, exact.query_suffix),
        query_block=weights.query_block_of(part.q, precision),
        keep_diagonal=weights.keep_diagonal and part.queries_are_keys,
    )
    may_fit = forced.selected(sparsity) < sum(forced)
    out, ratio, judging = _mixed(attend, part.q.shape[part.token_axis], part, weights, call_ratio, may_fit)
    return out, ratio, forced.attended_keys(keys, sparsity), keys, judging


def sparse_stretches(request, stretches, weights, *, sparsity, precision, scale, reference_keys, call_ratio=None):
    """The same for the queries of all stretches of a call, own_rows() and ratio in the order of gathered_queries()."""
    part = video_part(request, ExactTokens())
    selected = selected_with_references(stretches, sparsity, reference_keys, keep_diagonal=weights.keep_diagonal)
    attend = functools.partial(
        attend_with_references,
        q=part.q,
        k=part.k,
        v=part.v,
        stretches=stretches,
        proj_q=weights.proj_q,
        proj_k=weights.proj_k,
        sparsity=sparsity,
        precision=precision,
        scale=scale,
        reference_keys=reference_keys,
        layout=part.layout,
        room=stretches.room,
        query_block=weights.query_block_of(part.q, precision),
        keep_diagonal=weights.keep_diagonal,
    )
    may_fit = selected < block_count(stretches.tokens, K_BLOCK)
    out, ratio, judging = _mixed(attend, stretches.gathered_rows, part, weights, call_ratio, may_fit)
    return out, ratio, min(stretches.tokens, selected * K_BLOCK), stretches.tokens, judging


def _mixed(attend, rows, part, weights, call_ratio, may_fit):
    """(out, ratio of each of ``rows`` query rows, ExactRows or None). may_fit: whether a key block is left out at all."""
    if call_ratio is not None and call_ratio.number is not None and may_fit:
        return _fitted(attend, rows, part, call_ratio)
    if weights.linear_branch:
        ratio = weights.ratio if call_ratio is None or call_ratio.number is not None else call_ratio.kept.ratio
        return *attend(sla2_attention, alpha=ratio, return_alpha=True), None
    return *attend(sla_attention, proj_l=weights.proj_l, return_alpha=True), None


def _fitted(attend, tokens, part, call_ratio):
    """(out, ratio, ExactRows) of a call that fits its ratio, and keeps it for the calls that do not."""
    rows = sample_rows(tokens, call_ratio.number, part.q.device)
    found = attend(fitted_attention, rows=rows)
    if call_ratio.kept is not None:
        call_ratio.kept.keep(found.ratio)
    judging = ExactRows(rows, found.dense, part.layout)
    return found.out, found.ratio[..., None].expand(-1, -1, tokens), judging


def sparse_request(request, exact, weights, *, reference_keys, **options):
    """What sparse_video() returns of a call, or where its references run sparse too, sparse_stretches()."""
    stretches = stretches_of(request, exact)
    if stretches is None:
        return sparse_video(video_part(request, exact), exact, weights, scale=request.scale, **options)
    return sparse_stretches(request, stretches, weights, scale=request.scale, reference_keys=reference_keys, **options)


def leaves_out(request, exact, sparsity, keep_diagonal=False, reference_keys=REFERENCE_KEYS[0]):
    """Whether sparse_request() leaves a key block to the linear branch."""
    stretches = stretches_of(request, exact)
    if stretches is None:
        forced = forced_block_counts(request.key_tokens, exact.key_prefix, exact.key_suffix)
        return forced.selected(sparsity) < sum(forced)
    selected = selected_with_references(stretches, sparsity, reference_keys, keep_diagonal=keep_diagonal)
    return selected < block_count(stretches.tokens, K_BLOCK)


def own_rows(out, request, exact):
    """The rows that sparse_request() computed, a view of its ``out``: to be looked at before the other rows are written."""
    axis, stretches = 1 if request.flat_output else 2, stretches_of(request, exact)
    if stretches is not None:
        return gathered_rows(out, stretches, axis)
    return out.narrow(axis, exact.query_prefix, request.tokens - exact.query_prefix - exact.query_suffix)


def with_dense_rows(out, request, exact, dense):
    """The whole call's output: ``out`` of sparse_request() with the rows of these slices as dense(slice, ...) computes them."""
    flat, stretches = request.flat_output, stretches_of(request, exact)
    out, axis = (out.flatten(2), 1) if flat else (out, 2)
    if stretches is not None:
        return whole_output(out, lambda ranges: dense(*(slice(*own) for own in ranges)), stretches, axis)
    return with_exact_rows(
        out, dense, tokens=request.tokens, prefix=exact.query_prefix, suffix=exact.query_suffix, axis=axis
    )


def takes_rows(request):
    """Whether rows_of_request() is faster than dense attention."""
    return takes_exact_rows(request.q, request.k, request.v, "BNHD")


def rows_of_request(request, *rows):
    """Exact attention of the query rows of these slices, in the layout that the call expects back."""
    parts = [request.q[:, own] for own in rows]
    q = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    out = exact_rows(q, request.k, request.v, scale=request.scale, layout="BNHD")
    return out.flatten(2) if request.flat_output else out.transpose(1, 2)


def rows_below(below, args, kwargs):
    """A function of slices: these query rows of the call, as ``below`` computes them."""

    def rows_of(*rows):
        asked = by_name(args, kwargs)
        q, heads_first = asked["q"], asked.get("skip_reshape")
        parts = [q[:, :, own] if heads_first else q[:, own] for own in rows]
        q = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2 if heads_first else 1)
        new_args, new_kwargs = with_queries(args, kwargs, q)
        return below(*new_args, **new_kwargs)

    return rows_of
