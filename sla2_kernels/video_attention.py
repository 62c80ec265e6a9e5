"""One function for packs that build their own models (WanVideoWrapper, Ray and multi-GPU packs): no MODEL, no ComfyUI.

    from sla2_kernels.video_attention import video_attention

    out = video_attention(q, k, v, front=text_tokens, sparsity=0.9, layout="BNHD")

State is the caller's: nothing is kept between calls, any thread may call.
"""

import functools

import torch

from .arguments import TOKENS_DIM, check_dimensions, check_inputs, check_options, checked_count, checked_ranges
from .attention import sla2_attention
from .exact_ends import attend_video, with_exact_rows
from .exact_rows import exact_rows
from .references import REFERENCE_KEYS, attend_with_references
from .router import Q_BLOCK
from .sla_v1 import sla_attention
from .stretches import Stretches, whole_output
from .support import MINIMUM_TOKENS, resolve_precision, unsupported_reason


def video_attention(
    q,
    k,
    v,
    proj_q=None,
    proj_k=None,
    alpha=None,
    *,
    front=0,
    back=0,
    sparsity=0.9,
    precision="auto",
    layout="BHND",
    scale=None,
    method="sla2",
    proj_l=None,
    dense=None,
    backend="auto",
    keep_diagonal=False,
    references=(),
    reference_keys=REFERENCE_KEYS[0],
    query_block=Q_BLOCK,
):
    """Self-attention of a video model: the video's tokens sparse, the ``front`` and ``back`` tokens around them exact.

    Args:
        q, k, v: (B, H, N, D), or (B, N, H, D) with layout "BNHD"; equally many tokens.
        proj_q, proj_k, alpha: a layer of a router: ``layer.proj_q``, ``layer.proj_k``, ``weights.ratio(layer, sparsity)``.
            alpha is ignored by the methods other than "sla2".
        front, back: number of tokens before and after the video's: text, references, poses. All queries attend them, and
            their queries attend all keys.
        sparsity: share of the video's key blocks that is skipped, 0 to below 1.
        precision: "16bit", "int8", "fp8", or "auto": the fastest of the device.
        method: "sla2", "top-k only" (no linear part), or "sla" (SLA v1) with ``proj_l`` = (weight, bias) of the layer.
        dense: dense(q, k, v), in the same layout and of q's shape, for the exact rows; None is :func:`sla2_kernels.exact_rows.exact_rows`.
        backend: as in :func:`sla2_kernels.sla2_attention`.
        keep_diagonal: each query block always takes the key blocks of its own tokens: right for an untrained router, or
            ``weights.keep_diagonal`` of a trained one.
        references: (start, stop) of reference images and videos among the ``front`` and ``back`` tokens. Their queries run
            sparse, like the video's; the rest of those tokens stays exact.
        reference_keys: "routed": selected like the video's, at least one key block of each reference; "exact": all queries
            attend them all.
        query_block: as in :func:`sla2_kernels.sla2_attention`; ``weights.q_block`` of a trained router.

    Returns:
        The output, in q's layout and dtype.

    Raises:
        ValueError: an argument does not fit; the sentence says which. Ask :func:`why_dense` first, and call your own dense
        attention where it has an answer: whether sparse pays is the caller's decision.
    """
    if method not in ("sla2", "sla", "top-k only") or (method == "sla") != (proj_l is not None):
        raise ValueError(f'method must be "sla2", "top-k only", or "sla" with proj_l, got {method!r}.')
    check_options(layout, backend, query_block=query_block)
    check_inputs(layout, q=q, k=k, v=v)
    prefix, suffix = checked_count("front", front), checked_count("back", back)
    axis = TOKENS_DIM[layout]
    tokens = q.shape[axis]
    if k.shape[axis] != tokens:
        raise ValueError(f"q and k must have equally many tokens, got {tokens} and {k.shape[axis]}.")
    if prefix < 0 or suffix < 0 or prefix + suffix >= tokens:
        raise ValueError(
            f"front and back must be at least 0 and leave video tokens, got {prefix} and {suffix} of {tokens}."
        )
    if method == "sla2":
        attend = functools.partial(sla2_attention, alpha=alpha)
    else:
        attend = functools.partial(sla_attention, proj_l=proj_l)
    routing = {
        "proj_q": proj_q,
        "proj_k": proj_k,
        "sparsity": sparsity,
        "precision": resolve_precision(precision, q.device),
        "layout": layout,
        "scale": scale,
        "backend": backend,
        "keep_diagonal": keep_diagonal,
        "query_block": query_block,
    }
    dense = dense or functools.partial(exact_rows, layout=layout, scale=scale, backend=backend)

    def exact(rows):
        found = dense(rows, k, v)
        check_dimensions("what dense() returns", found, layout)
        if found.shape != rows.shape:  # of fewer rows or heads it would be repeated
            raise ValueError(f"dense() must return q's shape {tuple(rows.shape)}, got {tuple(found.shape)}.")
        return found

    references = checked_ranges("references", references)
    if references:
        stretches = Stretches(tokens, (prefix, tokens - suffix), references)
        routing["room"] = stretches.room
        out = attend_with_references(attend, q, k, v, stretches, reference_keys=reference_keys, **routing)

        def dense_ranges(ranges):
            return exact(torch.cat([q.narrow(axis, start, stop - start) for start, stop in ranges], dim=axis))

        return whole_output(out, dense_ranges, stretches, axis)
    video = q.narrow(axis, prefix, tokens - prefix - suffix)
    out = attend_video(attend, video, k, v, key_prefix=prefix, key_suffix=suffix, room=(prefix, suffix), **routing)

    def dense_rows(rows):
        return exact(q.narrow(axis, rows.start, rows.stop - rows.start))

    return with_exact_rows(out, dense_rows, tokens=tokens, prefix=prefix, suffix=suffix, axis=axis)


def why_dense(q, *, layout="BHND", precision="auto", minimum_tokens=MINIMUM_TOKENS):
    """None, or one sentence why this call should run dense: too short to gain, or nothing fast can take it."""
    check_options(layout)
    check_dimensions("q", q, layout)
    tokens, minimum_tokens = q.shape[TOKENS_DIM[layout]], checked_count("minimum_tokens", minimum_tokens)
    if tokens < minimum_tokens:
        return f"the sequence has {tokens} tokens, minimum_tokens is {minimum_tokens}"
    return unsupported_reason(q.device, q.dtype, q.shape[-1], resolve_precision(precision, q.device))
