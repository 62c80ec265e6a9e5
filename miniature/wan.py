"""The Wan2.1 text-to-video transformer, written for training and for experiments with its attention.

State-dict keys and arithmetic are those ComfyUI expects of a Wan2.1 checkpoint, so the weights load with the stock
UNETLoader (tests/miniature compares both, number by number). Wan2.1: arXiv 2503.20314.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .scaled import rope_scale as scale_at

HEAD_DIM = 128
ROPE_AXES = (44, 42, 42)
PATCH = 2

# (layer, q, k, v) -> out, all (B, N, H, D); q and k after normalisation and rotation.
Attention = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class WanConfig:
    """Sizes of the transformer. The number of heads is dim / 128."""

    dim: int = 256
    ffn_dim: int = 768
    num_layers: int = 6
    channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256

    @property
    def num_heads(self) -> int:
        return self.dim // HEAD_DIM

    @classmethod
    def from_state_dict(cls, state: dict[str, torch.Tensor]) -> WanConfig:
        """Sizes read from the tensors of a checkpoint."""
        return cls(
            dim=state["head.modulation"].shape[-1],
            ffn_dim=state["blocks.0.ffn.0.weight"].shape[0],
            num_layers=len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
            channels=state["patch_embedding.weight"].shape[1],
            text_dim=state["text_embedding.0.weight"].shape[1],
            freq_dim=state["time_embedding.0.weight"].shape[1],
        )


def dense_attention(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Full softmax attention on (B, N, H, D) views; the layer number is ignored."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


dense_attention.ignores_layer = True


def rope_table(
    grid: tuple[int, int, int], device: torch.device | str = "cpu", scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin), each (tokens, 1, 64) float32, for tokens in t-h-w raster order, neighbours `scale` apart along h and w."""
    steps = (1.0, scale, scale)
    axes = [torch.arange(n, dtype=torch.float64) * step for n, step in zip(grid, steps, strict=True)]
    axes = torch.meshgrid(*axes, indexing="ij")
    angles = []
    for position, width in zip(axes, ROPE_AXES, strict=True):
        frequency = 10000.0 ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles.append(position.reshape(-1, 1) * frequency)
    angle = torch.cat(angles, -1)[:, None]
    return angle.cos().float().to(device), angle.sin().float().to(device)


def apply_rope(x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate neighbouring pairs of the last dimension of x (B, N, H, 128); float32 inside, x's dtype outside."""
    cos, sin = rope
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


def timestep_embedding(t: torch.Tensor, dim: int) -> torch.Tensor:
    """(B, dim) cosines then sines of t (B,), which runs from 0 to 1000."""
    half = dim // 2
    frequency = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], -1)


class WanAttention(nn.Module):
    """Projections and q/k normalisation, shared by self and cross attention."""

    def __init__(self, dim: int):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)

    def project(self, x: torch.Tensor, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v as (B, N, H, 128), in v's dtype; the norms run in their weights' dtype, float32 under autocast."""
        v = self.v(context)
        exact = self.norm_q.weight.dtype
        q, k = self.norm_q(self.q(x).to(exact)).to(v.dtype), self.norm_k(self.k(context).to(exact)).to(v.dtype)
        return tuple(part.unflatten(-1, (-1, HEAD_DIM)) for part in (q, k, v))


class WanBlock(nn.Module):
    """Self attention, cross attention and feed-forward, the first and last modulated by the timestep."""

    def __init__(self, dim: int, ffn_dim: int):
        super().__init__()
        self.self_attn = WanAttention(dim)
        self.norm3 = nn.LayerNorm(dim, 1e-6)
        self.cross_attn = WanAttention(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / math.sqrt(dim))

    def forward(self, x, modulation, rope, context, layer: int, attention: Attention):
        """x (B, N, dim), modulation (B, 6, dim), context (B, L, dim) -> (B, N, dim)."""
        modulation = self.modulation + modulation
        q, k, v = self.before_attention(x, modulation, rope)
        return self.after_attention(x, modulation, attention(layer, q, k, v), context)

    def before_attention(self, x, modulation, rope):
        """q, k, v of self attention, (B, N, H, 128); modulation (B, 6, dim) with this block's own."""
        shift, scale = modulation.chunk(6, dim=1)[:2]
        q, k, v = self.self_attn.project(*[_modulated(x, shift, scale)] * 2)
        return apply_rope(q, rope), apply_rope(k, rope), v

    def after_attention(self, x, modulation, out, context):
        """What the block returns; out (B, N, H, 128): self attention's. modulation as before."""
        _, _, gate1, shift, scale, gate2 = modulation.chunk(6, dim=1)
        x = x + gate1 * self.self_attn.o(out.flatten(2))
        out = dense_attention(0, *self.cross_attn.project(self.norm3(x), context))
        x = x + self.cross_attn.o(out.flatten(2))
        return x + gate2 * self.ffn(_modulated(x, shift, scale))


def _modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class WanHead(nn.Module):
    """Modulated projection from a token to the velocities of its patch."""

    def __init__(self, dim: int, channels: int):
        super().__init__()
        self.head = nn.Linear(dim, channels * PATCH * PATCH)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / math.sqrt(dim))

    def forward(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        shift, scale = (self.modulation + e[:, None]).chunk(2, dim=1)
        return self.head(_modulated(x, shift, scale))


class WanModel(nn.Module):
    """Predicts the flow-matching velocity (noise - video) of a latent video."""

    def __init__(self, config: WanConfig = WanConfig()):
        super().__init__()
        dim = config.dim
        if dim % HEAD_DIM:
            raise ValueError(f"dim is {dim}, it must be a multiple of {HEAD_DIM} (ComfyUI infers the heads from it)")
        self.config = config
        self.patch_embedding = nn.Conv3d(config.channels, dim, (1, PATCH, PATCH), (1, PATCH, PATCH))
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, dim * 6))
        self.blocks = nn.ModuleList(WanBlock(dim, config.ffn_dim) for _ in range(config.num_layers))
        self.head = WanHead(dim, config.channels)
        self.run_block = WanBlock.__call__  # not forward, which goes past FSDP's hooks

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        context: torch.Tensor,
        attention: Attention = dense_attention,
        rope_scale: float | None = None,
    ) -> torch.Tensor:
        """The velocity of x.

        Args:
            x: (B, 16, T, H, W) normalised latents; H and W even.
            t: (B,) noise level times 1000.
            context: (B, L, 4096) from captions.embed().
            attention: called once per layer instead of dense self attention, e.g. to record or to replace it:
                attention(layer, q, k, v) -> out, all (B, N, H, 128).
            rope_scale: distance of neighbouring tokens along h and w, ScaleROPE's scale_x and scale_y in ComfyUI;
                None: that of training, 480 / the picture's height in pixels.
        """
        b, c, frames, height, width = x.shape
        if height % PATCH or width % PATCH:
            raise ValueError(f"latent is {height}x{width}, the miniature needs even sides: change the video's size")
        grid = (frames, height // PATCH, width // PATCH)
        rope = self._rope(grid, x.device, scale_at(8 * height) if rope_scale is None else rope_scale)
        x = x.reshape(b, c, frames, grid[1], PATCH, grid[2], PATCH).permute(0, 2, 3, 5, 1, 4, 6).flatten(4)
        dtype, x = x.dtype, x.flatten(1, 3)
        # The residual stream keeps the input's dtype: float32 under autocast.
        x = F.linear(x, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias).to(dtype)
        e = self.time_embedding(timestep_embedding(t, self.config.freq_dim).to(x.dtype))
        modulation = self.time_projection(e).unflatten(1, (6, -1))
        context = self.text_embedding(context.to(x.dtype))
        run = self.run_block if self.training else WanBlock.__call__
        for layer, block in enumerate(self.blocks):
            # Where attention ignores the number, a constant one lets all layers share one compiled block.
            number = 0 if getattr(attention, "ignores_layer", False) else layer
            x = run(block, x, modulation, rope, context, number, attention)
        x = self.head(x, e).reshape(b, *grid, PATCH, PATCH, c)
        return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(b, c, frames, height, width)

    def _rope(
        self, grid: tuple[int, int, int], device: torch.device, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The last few grids' tables, kept because building one costs more than a training step's launch."""
        cache = self.__dict__.setdefault("_rope_cache", {})
        key = (grid, device, scale)
        if key not in cache:
            cache.clear() if len(cache) > 4 else None
            cache[key] = rope_table(grid, device, scale)
        return cache[key]
