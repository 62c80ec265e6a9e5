"""Encoded clips of one size, with the scenes they were drawn from."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from . import videos
from .captions import Caption
from .vae import WanVAE, normalise_latents


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
    frames, height, width = size
    scenes = videos.simulate([captions[i] for i in chosen], frames=frames, height=height, width=width, seed=seed)
    scenes = scenes.to(device)
    batch = max(1, pixels // (frames * height * width))
    parts = []
    for first in range(0, len(chosen), batch):
        index = torch.arange(first, min(first + batch, len(chosen)), device=device)
        clip = videos.render(scenes.select(index), frames=frames, height=height, width=width)
        with torch.autocast(device.type, torch.bfloat16):
            code = vae.encode(clip)
        parts.append(normalise_latents(code.float()).bfloat16())
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if time.monotonic() > until:
            break
    latents = torch.cat(parts)
    made = torch.arange(len(latents), device=device)
    return Pool(latents, scenes.select(made), torch.tensor(chosen[: len(latents)], device=device))
