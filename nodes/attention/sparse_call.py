"""One self-attention call of a video model, computed: the video's queries sparse, those of other tokens dense.

Text, reference and pose tokens keep their exact share: their keys are attended by every query, their queries see every key.
"""

from dataclasses import dataclass

import torch

from ...sla2_kernels import K_BLOCK, sla2_attention
from ...sla2_kernels.attention import RoutedBlocks
from ...sla2_kernels.fitted_attention import FITTED_ROWS, fitted_attention, sample_rows, squared_error
from ...sla2_kernels.forced_blocks import attended_keys, select_with_forced_blocks, selected_with_forced
from ...sla2_kernels.router import block_count
from ...sla2_kernels.sla_v1 import sla_attention
from ...sla2_kernels.support import without_autocast


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
    """Query rows of the video that a fitted call computed exactly and did not fit: what its output is judged by.

    rows: int32 (R,). dense: float32 (B, H, R, D). layout: of the output.
    """

    rows: torch.Tensor
    dense: torch.Tensor
    layout: str

    def squares(self, out):
        """squared_error() of a call's output ``out``."""
        out = out.transpose(1, 2) if self.layout == "BNHD" else out
        return squared_error(out, self.dense, self.rows)


def sparse_video(part, exact, weights, *, sparsity, precision, scale, call_ratio=None):
    """(out, ratio, kept, keys, ExactRows or None): the video's queries attend ``kept`` of ``keys`` keys exactly.

    ratio: of each query row, float32 (B, H, N). weights: CallWeights. call_ratio: CallRatio where the ratio is fitted; a call
    that keeps all blocks needs none.
    """
    proj_q, proj_k = weights.proj_q, weights.proj_k
    keys = part.k.shape[part.token_axis]
    kept = attended_keys(keys, sparsity, exact.key_front, exact.key_back)
    leaves_a_block = selected_with_forced(keys, sparsity, exact.key_front, exact.key_back) < block_count(keys, K_BLOCK)
    keep_diagonal = weights.keep_diagonal and part.queries_are_keys
    selection = None
    if exact.key_front or exact.key_back:
        selected = select_with_forced_blocks(
            part.q, part.k, proj_q, proj_k,
            sparsity=sparsity, front=exact.key_front, back=exact.key_back, layout=part.layout,
            keep_diagonal=keep_diagonal,
        )  # fmt: skip
        selection = RoutedBlocks(selected)
    options = {
        "proj_q": proj_q, "proj_k": proj_k, "sparsity": sparsity, "precision": precision, "scale": scale,
        "layout": part.layout, "key_blocks": selection, "keep_diagonal": keep_diagonal,
    }  # fmt: skip
    if call_ratio is not None and call_ratio.number is not None and leaves_a_block:
        out, ratio, judging = _fitted(part, call_ratio, options)
        return out, ratio, kept, keys, judging
    if weights.linear_branch:
        alpha = weights.alpha if call_ratio is None or call_ratio.number is not None else call_ratio.kept.ratio
        out, ratio = sla2_attention(part.q, part.k, part.v, alpha=alpha, return_alpha=True, **options)
    else:
        out, ratio = sla_attention(part.q, part.k, part.v, weights.proj_l, return_alpha=True, **options)
    return out, ratio, kept, keys, None


def _fitted(part, call_ratio, options):
    """(out, ratio, ExactRows) of a call that fits its ratio, and keeps it for those that do not."""
    tokens = part.q.shape[part.token_axis]
    rows = sample_rows(tokens, call_ratio.number, part.q.device)
    found = fitted_attention(part.q, part.k, part.v, rows=rows, **options)
    if call_ratio.kept is not None:
        call_ratio.kept.keep(found.ratio)
    judging = ExactRows(rows[FITTED_ROWS:], found.dense[:, :, FITTED_ROWS:], part.layout)
    return found.out, found.ratio[..., None].expand(-1, -1, tokens), judging


def with_dense_rows(out, request, exact, dense):
    """The whole call's output: ``out`` of the video's queries between the rows that ``dense`` computes exactly."""
    out = out.flatten(2) if request.flat_output else out
    axis = 1 if request.flat_output else 2
    parts = [out]
    if exact.query_front:
        parts.insert(0, dense(slice(0, exact.query_front)))
    if exact.query_back:
        parts.append(dense(slice(request.tokens - exact.query_back, request.tokens)))
    # under autocast the dense rows have its dtype, and joining the two 16-bit types would fail
    with without_autocast(out.device):
        return torch.cat([part.to(out.dtype) for part in parts], dim=axis) if len(parts) > 1 else out


def rows_of_call(args, kwargs, rows):
    """(args, kwargs) of the same call with only these query rows."""
    heads_first = kwargs["skip_reshape"] if "skip_reshape" in kwargs else len(args) > 6 and args[6]
    q = args[0] if args else kwargs["q"]
    q = q[:, :, rows] if heads_first else q[:, rows]
    return ((q, *args[1:]), kwargs) if args else (args, {**kwargs, "q": q})
