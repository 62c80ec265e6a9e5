"""What training the miniature's transformer takes: flow-matching loss, noise levels, encoded clips."""

from __future__ import annotations

import math

import torch

from .captions import Caption
from .pool import Pool, fill_pool
from .vae import WanVAE

ABOUT = "Wan2.1-shaped text-to-video transformer, trained on procedural videos (miniature/README.md)"
DIT_FILE = "wan_miniature_dit.safetensors"
EMPTY = -1
MATRICES = {"q.weight", "k.weight", "v.weight", "o.weight", "ffn.0.weight", "ffn.2.weight"}


def is_block_matrix(name: str, p: torch.Tensor) -> bool:
    """Whether Muon trains this parameter: the matrices of the blocks."""
    return name.startswith("blocks") and name.split(".", 2)[2].split("attn.")[-1] in MATRICES


@torch.no_grad()
def encode_clips(
    vae: WanVAE, captions: list[Caption], chosen: list[int], *, size, seed: int, batch: int, device, until: float
) -> Pool:
    """Render and encode one clip per chosen caption number, `batch` at a time; stops early (with at least a batch) when `until` passes."""
    return fill_pool(
        vae, captions, chosen, size=size, seed=seed, device=device, until=until, pixels=batch * math.prod(size)
    )


def noise_levels(batch: int, shift: float, generator: torch.Generator) -> torch.Tensor:
    """(batch,) levels in (0, 1), one from each equal part of the range, shifted towards noise as sampling is."""
    u = (torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)) / batch
    u = u.clamp(1e-4, 1 - 1e-4)
    return shift * u / (1 + (shift - 1) * u)


def flow_loss(model, clean, noise, t, context) -> torch.Tensor:
    """(B,) mean squared error of the velocity noise - clean at noise level t."""
    level = t.view(-1, 1, 1, 1, 1)
    noisy = torch.lerp(clean, noise, level)
    with torch.autocast(clean.device.type, torch.bfloat16):
        velocity = model(noisy, t * 1000, context)
    return (velocity.float() - (noise - clean)).square().mean((1, 2, 3, 4))


def validation_loss(*arguments, **options) -> float:
    """Mean of validation_losses(), whose arguments it takes."""
    losses = validation_losses(*arguments, **options)
    return sum(losses) / len(losses)


@torch.no_grad()
def validation_losses(
    model,
    data: Pool,
    contexts: torch.Tensor,
    levels: int = 8,
    clips: int | None = None,
) -> list[float]:
    """Flow loss of each clip, the mean over evenly spaced noise levels, with noise that is the same at every call."""
    device, losses = data.latents.device, []
    for i in range(min(clips or len(data.latents), len(data.latents))):
        clean = data.latents[i : i + 1].float()
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1000 + i)).to(device)
        total = 0.0
        for level in range(levels):
            t = torch.full((1,), (level + 0.5) / levels, device=device)
            total += flow_loss(model, clean, noise, t, contexts[data.caption[i : i + 1]])
        losses.append((total / levels).item())
    return losses
