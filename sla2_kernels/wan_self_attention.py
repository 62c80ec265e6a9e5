"""Self-attention of diffusers' Wan transformer up to the attention itself: projections and rotary embedding.

sla2_diffusers.py runs it for inference, sla2_training/stage2 for training. Takes diffusers' modules, and imports none.
"""

import torch

MODEL_FAMILY = "wan"
VACE_FAMILY = "wan-vace"  # of routers that cover vace_blocks too, after the blocks


def project_qkv(attn, x):
    """q, k, v of a Wan self-attention as views (B, N, H, D), q and k normalised; x (B, N, C)."""
    if getattr(attn, "fused_projections", False):
        q, k, v = attn.to_qkv(x).chunk(3, dim=-1)
    else:
        q, k, v = attn.to_q(x), attn.to_k(x), attn.to_v(x)
    return tuple(t.unflatten(2, (attn.heads, -1)) for t in (attn.norm_q(q), attn.norm_k(k), v))


def rotate(x, cos, sin):
    """Rotary embedding of neighbouring pairs of x (B, N, H, D); cos and sin (1, N, 1, D) hold every angle twice."""
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)
