"""One function for packs that build their own models (WanVideoWrapper, Ray and multi-GPU packs): no MODEL, no ComfyUI.

    from sla2_kernels.video_attention import video_attention

    out = video_attention(q, k, v, front=text_tokens, sparsity=0.9, layout="BNHD")

State is the caller's: nothing is kept between calls, any thread may call.
"""

import torch
import torch.nn.functional as F

from .arguments import TOKENS_DIM, check_dimensions, check_inputs, check_options, checked_count
from .attention import RoutedBlocks, sla2_attention
from .forced_blocks import select_with_forced_blocks
from .sla_v1 import sla_attention
from .support import default_precision, unsupported_reason, without_autocast


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
):
    """Self-attention of a video model: the video's tokens sparse, ``front`` and ``back`` others at the ends exact.

    Args:
        q, k, v: (B, H, N, D), or (B, N, H, D) with layout "BNHD"; equally many tokens.
        proj_q, proj_k, alpha: a layer of a router: ``layer.proj_q``, ``layer.proj_k``, ``weights.ratio(layer, sparsity)``.
        front, back: tokens before and behind the video's: text, references, poses. All queries attend them, and their
            queries attend everything.
        sparsity: share of the video's key blocks that is skipped, 0 to below 1.
        precision: "16bit", "int8", "fp8", or "auto": the fastest of the device.
        method: "sla2", "top-k only" (no linear part), or "sla" (SLA v1) with ``proj_l`` = (weight, bias) of the layer.
        dense: dense(q, k, v) in the same layout, for the exact rows; None is torch's scaled_dot_product_attention.
        backend: as in :func:`sla2_kernels.sla2_attention`.
        keep_diagonal: each query block always takes the key blocks of its own tokens: right for an untrained router, or
            ``weights.keep_diagonal`` of a trained one.

    Returns:
        The output, in q's layout and dtype.

    Raises:
        ValueError: an argument does not fit; the sentence says which. Ask :func:`why_dense` first, and call your own dense
        attention where it has an answer: whether sparse pays is the caller's decision.
    """
    if method not in ("sla2", "sla", "top-k only") or (method == "sla") != (proj_l is not None):
        raise ValueError(f'method must be "sla2", "top-k only", or "sla" with proj_l, got {method!r}.')
    check_options(layout, backend)
    check_inputs(layout, q=q, k=k, v=v)
    front, back = checked_count("front", front), checked_count("back", back)
    axis = TOKENS_DIM[layout]
    tokens = q.shape[axis]
    if k.shape[axis] != tokens:
        raise ValueError(f"q and k must have equally many tokens, got {tokens} and {k.shape[axis]}.")
    if front < 0 or back < 0 or front + back >= tokens:
        raise ValueError(
            f"front and back must be at least 0 and leave video tokens, got {front} and {back} of {tokens}."
        )
    video = q.narrow(axis, front, tokens - front - back)
    options = {
        "proj_q": proj_q, "proj_k": proj_k, "sparsity": sparsity, "layout": layout, "scale": scale, "backend": backend,
        "keep_diagonal": keep_diagonal,
        "precision": default_precision(q.device) if precision == "auto" else precision,
    }  # fmt: skip
    if front or back:
        blocks = select_with_forced_blocks(
            video, k, proj_q, proj_k, sparsity=sparsity, front=front, back=back, layout=layout, backend=backend,
            keep_diagonal=keep_diagonal,
        )  # fmt: skip
        options["key_blocks"] = RoutedBlocks(blocks)
    if method == "sla2":
        out = sla2_attention(video, k, v, alpha=alpha, **options)
    else:
        out = sla_attention(video, k, v, proj_l, **options)
    if not (front or back):
        return out
    exact = dense or (lambda *tensors: _dense(*tensors, layout, scale))
    parts = [exact(q.narrow(axis, 0, front), k, v)] if front else []
    parts.append(out)
    parts += [exact(q.narrow(axis, tokens - back, back), k, v)] if back else []
    # under autocast the exact rows have its dtype, and joining the two 16-bit types would fail
    with without_autocast(q.device):
        return torch.cat([part.to(q.dtype) for part in parts], dim=axis)


def why_dense(q, *, layout="BHND", precision="auto", minimum_tokens=8192):
    """None, or one sentence why this call should run dense: too short to gain, or nothing fast can take it."""
    check_options(layout)
    check_dimensions("q", q, layout)
    tokens = q.shape[TOKENS_DIM[layout]]
    if tokens < minimum_tokens:
        return f"the sequence has {tokens} tokens, minimum_tokens is {minimum_tokens}"
    precision = default_precision(q.device) if precision == "auto" else precision
    return unsupported_reason(q.device, q.dtype, q.shape[-1], precision)


def _dense(q, k, v, layout, scale):
    if layout == "BNHD":
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2) if layout == "BNHD" else out
