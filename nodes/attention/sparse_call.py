"""One self-attention call of a video model: the video's queries run sparse, those of text and references dense.

sla2_kernels/exact_ends.py is the same without ComfyUI; here are ComfyUI's layouts, and the ratio that a call fits.
"""

import functools
from dataclasses import dataclass

import torch

from ...sla2_kernels import sla2_attention
from ...sla2_kernels.exact_ends import attend_video, with_exact_rows
from ...sla2_kernels.fitted_attention import fitted_attention, sample_rows
from ...sla2_kernels.forced_blocks import forced_block_counts
from ...sla2_kernels.sla_v1 import sla_attention


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
        """False where queries of one frame meet keys of all frames."""
        return self.q.shape[self.token_axis] == self.video_k.shape[self.token_axis]


def video_part(request, exact):
    """VideoPart of an AttentionCall with these ExactTokens."""
    layout = "BNHD" if request.flat_output else "BHND"
    q, k, v = request.q, request.k, request.v
    queries = q[:, exact.query_front : q.shape[1] - exact.query_back]
    keys = k[:, exact.key_front : k.shape[1] - exact.key_back]
    views = (queries, k, v, keys)
    return VideoPart(*(views if request.flat_output else (t.transpose(1, 2) for t in views)), layout)


@dataclass(frozen=True)
class ExactRows:
    """Query rows of the video that a fitted call also computed exactly: its output is judged by those it did not fit.

    rows: int32 (R,). dense: float32 (B, H, R, D). layout: of the output.
    """

    rows: torch.Tensor
    dense: torch.Tensor
    layout: str

    def against(self, out):
        """(out (B, H, N, D), dense, rows): what add_errors() takes of a call's output ``out``."""
        return out.transpose(1, 2) if self.layout == "BNHD" else out, self.dense, self.rows


def forced_blocks(part, exact):
    """ForcedBlocks of a call's keys: those around the video's that every query attends."""
    return forced_block_counts(part.k.shape[part.token_axis], exact.key_front, exact.key_back)


def sparse_video(part, exact, weights, *, sparsity, precision, scale, call_ratio=None):
    """(out, ratio, kept, keys, ExactRows or None): the video's queries attend ``kept`` of ``keys`` keys exactly.

    ratio: of each query row, float32 (B, H, N). weights: CallWeights. call_ratio: CallRatio where the ratio is fitted; a call
    that keeps all blocks has nothing to fit.
    """
    keys, forced = part.k.shape[part.token_axis], forced_blocks(part, exact)
    kept = forced.attended_keys(keys, sparsity)
    fits = call_ratio is not None and call_ratio.number is not None and forced.selected(sparsity) < sum(forced)
    attend = functools.partial(
        attend_video,
        q=part.q,
        k=part.k,
        v=part.v,
        key_prefix=exact.key_front,
        key_suffix=exact.key_back,
        proj_q=weights.proj_q,
        proj_k=weights.proj_k,
        sparsity=sparsity,
        precision=precision,
        scale=scale,
        layout=part.layout,
        keep_diagonal=weights.keep_diagonal and part.queries_are_keys,
    )
    if fits:
        out, ratio, judging = _fitted(part, call_ratio, attend)
        return out, ratio, kept, keys, judging
    if weights.linear_branch:
        alpha = weights.alpha if call_ratio is None or call_ratio.number is not None else call_ratio.kept.ratio
        out, ratio = attend(sla2_attention, alpha=alpha, return_alpha=True)
    else:
        out, ratio = attend(sla_attention, proj_l=weights.proj_l, return_alpha=True)
    return out, ratio, kept, keys, None


def _fitted(part, call_ratio, attend):
    """(out, ratio, ExactRows) of a call that fits its ratio, and keeps it for the calls that do not."""
    tokens = part.q.shape[part.token_axis]
    rows = sample_rows(tokens, call_ratio.number, part.q.device)
    found = attend(fitted_attention, rows=rows)
    if call_ratio.kept is not None:
        call_ratio.kept.keep(found.ratio)
    judging = ExactRows(rows, found.dense, part.layout)
    return found.out, found.ratio[..., None].expand(-1, -1, tokens), judging


def with_dense_rows(out, request, exact, dense):
    """The whole call's output: ``out`` of the video's queries between the rows that ``dense`` computes exactly."""
    flat = request.flat_output
    return with_exact_rows(
        out.flatten(2) if flat else out,
        dense,
        tokens=request.tokens,
        prefix=exact.query_front,
        suffix=exact.query_back,
        axis=1 if flat else 2,
    )


def rows_of_call(args, kwargs, rows):
    """(args, kwargs) of the same call with only these query rows."""
    heads_first = kwargs["skip_reshape"] if "skip_reshape" in kwargs else len(args) > 6 and args[6]
    q = args[0] if args else kwargs["q"]
    q = q[:, :, rows] if heads_first else q[:, rows]
    return ((q, *args[1:]), kwargs) if args else (args, {**kwargs, "q": q})
