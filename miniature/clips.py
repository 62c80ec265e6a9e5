"""Clips of captions: simulated as scenes, and these rendered and encoded."""

from __future__ import annotations

import time

import torch

from . import scaled, videos
from .captions import Caption
from .vae import WanVAE, normalise_latents


def simulate_clips(captions: list[Caption], chosen: list[int], size, seed: int, device) -> videos.Scenes:
    """One scene per chosen caption number, on `device`. size: (frames, height, width)."""
    frames, height, width = size
    wanted = [captions[i] for i in chosen]
    return scaled.simulate(wanted, frames=frames, height=height, width=width, seed=seed).to(device)


@torch.no_grad()
def encode_scenes(vae: WanVAE, scenes: videos.Scenes, *, size, batch: int, until: float) -> torch.Tensor:
    """Normalised latents (N, 16, T, h, w) in bfloat16 of the first N scenes, rendered at `size` and encoded `batch` at a time.

    All scenes, or fewer where time.monotonic() has passed `until` after a batch; at least one batch.
    """
    frames, height, width = size
    device, count = scenes.kind.device, len(scenes)
    parts = []
    for first in range(0, count, batch):
        index = torch.arange(first, min(first + batch, count), device=device)
        clip = videos.render(scenes.select(index), frames=frames, height=height, width=width)
        with torch.autocast(device.type, torch.bfloat16):
            code = vae.encode(clip)
        parts.append(normalise_latents(code.float()).bfloat16())
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if time.monotonic() > until:
            break
    return torch.cat(parts)
