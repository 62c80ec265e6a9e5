"""SLA, the predecessor of SLA2 (arXiv 2509.24006), for weights that were trained with it; and its sparse branch alone.

O = O_s + proj_l(O_l): softmax attention over the key blocks that the heuristic router picks, plus a projection of linear
attention over ALL keys (that is what the released code and the TurboDiffusion checkpoints do). Query blocks of 128 tokens
unless ``query_block`` says otherwise, key blocks of 64.
"""

import re
from dataclasses import dataclass

import torch

from .arguments import TOKENS_DIM, check_dimensions, check_linear_projection, check_options
from .attention import sla2_attention
from .support import without_autocast

TINY = 1e-5  # added to the linear branch's denominator where these weights were trained
CHUNK_BYTES = 128 * 2**20
KEY = re.compile(r"(?:.*\.)?blocks\.(\d{1,4})\.self_attn\.attn_op\.local_attn\.proj_l\.(weight|bias)")


@dataclass(frozen=True)
class SLAWeights:
    """proj_l of every layer: (weight (D, D), bias (D,)), float32, applied as torch.nn.Linear does."""

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    source: str = ""

    @property
    def head_dim(self):
        return self.layers[0][0].shape[0]


def take_sla_weights(state_dict, source=""):
    """SLAWeights out of a checkpoint's tensors, which are removed from it; ValueError with one sentence where there are none."""
    where = source or "this checkpoint"
    found = {}
    for name in [name for name in state_dict if isinstance(name, str) and KEY.fullmatch(name)]:
        layer, kind = KEY.fullmatch(name).groups()
        if (int(layer), kind) in found:
            raise ValueError(f"{where} holds the SLA {kind} of layer {layer} twice.")
        found[int(layer), kind] = state_dict.pop(name)
    if not found:
        raise ValueError(f"{where} holds no SLA weights (proj_l of the self-attention).")
    count = len({layer for layer, _ in found})
    layers = []
    for layer in range(count):
        weight, bias = found.get((layer, "weight")), found.get((layer, "bias"))
        if not (_is_floating(weight) and _is_floating(bias)) or weight.shape != (bias.numel(), bias.numel()):
            raise ValueError(f"{where} holds SLA weights, but those of layer {layer} are not complete.")
        weight, bias = weight.float(), bias.float().flatten()
        if weight.shape != (layers or [(weight, bias)])[0][0].shape:
            raise ValueError(f"{where} holds SLA weights of another head_dim in layer {layer} than in layer 0.")
        if not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
            raise ValueError(f"{where} holds NaN or infinity in the SLA weights of layer {layer}.")
        layers.append((weight, bias))
    return SLAWeights(tuple(layers), source)


def _is_floating(tensor):
    return isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.numel() > 0


def linear_over_all_keys(q, k, v):
    """O_l = phi(Q) (phi(K)^T V) / (phi(Q) sum phi(K) + 1e-5), phi the softmax over features; (B, H, N, D) in q's dtype.

    q (B, H, N, D), k and v (B, H, M, D) of any stride. Products of 16-bit inputs are 16-bit with float32 sums, a few heads
    at a time.
    """
    outputs, step = [], max(1, CHUNK_BYTES // (4 * k.shape[0] * max(q.shape[2], k.shape[2]) * k.shape[3]))
    step = min(step, q.shape[1])  # while torch.compile traces, a step depends on the length only where that matters
    for start in range(0, q.shape[1], step):
        heads = slice(start, start + step)
        phi_q, phi_k = (_phi(t[:, heads]) for t in (q, k))
        sums = phi_k.transpose(-1, -2) @ v[:, heads]
        norm = phi_q.to(_wide(q)) @ phi_k.sum(dim=2, dtype=_wide(q))[..., None]
        outputs.append(((phi_q @ sums).to(_wide(q)) / (norm + TINY)).to(q.dtype))
    return torch.cat(outputs, dim=1)


def _phi(x):
    return x.to(_wide(x)).softmax(dim=-1).to(x.dtype)


def _wide(x):
    return torch.promote_types(x.dtype, torch.float32)


def sla_attention(q, k, v, proj_l, *, sparsity=0.9, layout="BHND", return_alpha=False, room=(0, 0), **options):
    """SLA: O_s + proj_l(O_l).

    Args:
        q, k, v, sparsity, layout, room: as in :func:`sla2_kernels.sla2_attention`; so are ``options`` (precision, scale,
            key_blocks, backend, query_block) and the errors.
        proj_l: (weight (D, D), bias (D,)) as torch.nn.Linear applies them, or None for O_s alone ("top-k only").

    Returns:
        The output in q's layout and dtype; with ``return_alpha`` also ones (B, H, N), the share of the softmax branch.
    """
    check_options(layout)
    check_dimensions("q", q, layout)
    check_linear_projection(proj_l, q)
    out, share = sla2_attention(
        q, k, v, linear_branch=False, sparsity=sparsity, layout=layout, return_alpha=True, room=room, **options
    )
    if proj_l is not None:
        own = out.narrow(TOKENS_DIM[layout], room[0], q.shape[TOKENS_DIM[layout]])
        if layout == "BNHD":
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        weight, bias = (t.to(q.device, q.dtype) for t in proj_l)
        # in q's dtype, as the softmax branch is; torch.cat fails where autocast has the other 16-bit type
        with without_autocast(q.device):
            linear = torch.nn.functional.linear(linear_over_all_keys(q, k, v), weight, bias)
        own += linear if layout == "BHND" else linear.transpose(1, 2)
    return (out, share) if return_alpha else out
