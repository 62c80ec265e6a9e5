"""Encoded clips of one size, with the scenes they were drawn from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from . import videos
from .captions import Caption
from .clips import encode_scenes, simulate_clips
from .vae import WanVAE


@dataclass(frozen=True)
class Pool:
    """latents (N, 16, T, h, w): normalised, bfloat16. scenes: their N scenes. caption: (N,) number of each caption."""

    latents: torch.Tensor
    scenes: videos.Scenes
    caption: torch.Tensor

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def tokens(self) -> int:
        """Of one clip, in the transformer."""
        return self.latents[0, 0].numel() // 4


@torch.no_grad()
def fill_pool(
    vae: WanVAE, captions: list[Caption], chosen: list[int], *, size: tuple[int, int, int], seed: int, device,
    until: float = float("inf"), pixels: int = 8_000_000,
) -> Pool:  # fmt: skip
    """Render and encode one clip per chosen caption number, in batches of about `pixels` pixels.

    Args:
        size: (frames, height, width).
        until: time.monotonic() after which no further batch begins; at least one is made.
    """
    scenes = simulate_clips(captions, chosen, size, seed, device)
    latents = encode_scenes(vae, scenes, size=size, batch=max(1, pixels // math.prod(size)), until=until)
    made = torch.arange(len(latents), device=device)
    return Pool(latents, scenes.select(made), torch.tensor(chosen[: len(latents)], device=device))
