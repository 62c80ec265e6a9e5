"""One attention call as ComfyUI makes it: what was asked, and why SLA2 cannot take it."""

import math
from dataclasses import dataclass

import torch

from ...sla2_kernels import unsupported_reason
from ..compat.override_arguments import KEYWORDS, PARAMETERS, by_name
from .run_dense import RunDense
from .text_mask import HAS_MASK, masks_keys_alone

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class AttentionCall:
    """q, k, v: views (B, N, H, D). flat_output: (B, N, H * D) is expected back, else (B, H, N, D)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float | None
    flat_output: bool
    mask: torch.Tensor | None = None  # over keys alone

    @property
    def tokens(self):
        return self.q.shape[1]

    @property
    def key_tokens(self):
        return self.k.shape[1]


def read_call(args, kwargs):
    """AttentionCall of these arguments; raises RunDense where they ask for something that SLA2 does not implement."""
    _check_keywords(args, kwargs)
    asked = by_name(args, kwargs)
    _check_request(asked)
    _check_tensors(asked)
    views = [_blocks_of_heads(asked[name], asked["heads"], asked.get("skip_reshape")) for name in ("q", "k", "v")]
    mask = asked.get("mask")
    _check_shapes(*views)
    if mask is not None and not masks_keys_alone(mask, views[1].shape[1]):
        raise RunDense(HAS_MASK)
    return AttentionCall(*views, asked.get("scale"), not asked.get("skip_output_reshape"), mask)


def _check_keywords(args, kwargs):
    if len(args) > len(PARAMETERS):
        raise RunDense(f"the call has {len(args)} positional arguments, {len(PARAMETERS)} are known")
    unknown = sorted(set(kwargs) - set(PARAMETERS) - set(KEYWORDS))
    if unknown:
        raise RunDense(f"the call has the unknown keyword {unknown[0]}")
    missing = [name for name in PARAMETERS[len(args) : 4] if name not in kwargs]
    if missing:
        raise RunDense(f"the call has no {missing[0]}")


def _check_request(asked):
    q = asked["q"]
    if asked.get("enable_gqa"):
        raise RunDense("the call uses grouped-query attention")
    if asked.get("low_precision_attention") is False:
        raise RunDense("the model asks for full-precision attention in this call")
    precision = asked.get("attn_precision")
    if precision is not None and precision != getattr(q, "dtype", None):
        raise RunDense(f"the model asks for {str(precision).removeprefix('torch.')} attention in this call")
    scale = asked.get("scale")
    if scale is not None and not (isinstance(scale, (int, float)) and math.isfinite(scale) and scale > 0):
        raise RunDense("the call has a softmax scale that is not a finite number above 0")


def _check_tensors(asked):
    q, dimensions = asked["q"], 4 if asked.get("skip_reshape") else 3
    for name in ("q", "k", "v"):
        tensor = asked[name]
        if not isinstance(tensor, torch.Tensor):
            raise RunDense(f"{name} is a {type(tensor).__name__}, not a tensor")
        if tensor.dtype != q.dtype:
            raise RunDense("q, k and v have unlike dtypes")
        if tensor.device != q.device:
            raise RunDense("q, k and v lie on unlike devices")
        if tensor.dim() != dimensions or tensor.numel() == 0:
            raise RunDense(f"{name} has the unexpected shape {tuple(tensor.shape)}")
    if q.dtype not in DTYPES:
        raise RunDense(f"q, k and v are {str(q.dtype).removeprefix('torch.')}")
    heads = asked["heads"]
    if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1:
        raise RunDense(f"the call has {heads!r} heads")
    for name in ("q", "k", "v"):
        shape = asked[name].shape
        if (dimensions == 4 and shape[1] != heads) or (dimensions == 3 and shape[2] % heads):
            raise RunDense(f"{name} of shape {tuple(shape)} does not have {heads} heads")


def _blocks_of_heads(tensor, heads, heads_first):
    """A view (B, N, H, D), whichever of ComfyUI's two layouts came in."""
    return tensor.transpose(1, 2) if heads_first else tensor.view(*tensor.shape[:2], heads, -1)


def _check_shapes(q, k, v):
    if k.shape != v.shape or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise RunDense(f"q, k and v have unlike shapes {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}")


def check_sizes(facts, call):
    """Raises RunDense where the heads are not those of the model's self-attention: it is another call inside of it."""
    heads, head_dim = call.q.shape[2:]
    if (heads, head_dim) != (facts.num_heads, facts.head_dim):
        raise RunDense(
            f"the call has {heads} heads of {head_dim}, and this model's self-attention {facts.num_heads} of {facts.head_dim}"
        )


def check_supported(call, precision):
    """Raises RunDense where the operator cannot run this call at this precision."""
    reason = unsupported_reason(call.q.device, call.q.dtype, call.q.shape[3], precision)
    if reason is not None:
        raise RunDense(reason)
