"""Random but structured Q, K, V: what tests and a first look on a CPU train on. Not a claim about any real model.

A synthetic layer is fixed by its seed (its "weights"), an input by another one: tokens of a (t, h, w) video carry the
object they show, where they are, a texture that changes from token to token, and noise. Heads weigh these differently.
"""

import math

import torch

from miniature.captures import Capture

GROUPS = ("object", "position", "texture", "noise")


class SyntheticLayer:
    """One attention layer: sample(seed) gives q, k, v of a video, each (B, H, N, D) float32, N = t * h * w."""

    def __init__(self, seed=0, *, heads=2, head_dim=32, grid=(4, 16, 32), objects=8):
        generator = torch.Generator().manual_seed(seed)
        self.heads, self.head_dim, self.grid, self.objects = heads, head_dim, grid, objects
        width = head_dim // len(GROUPS)
        self.embedding = torch.randn(objects + 1, width, generator=generator)
        # a texture and noise as strong as the rest: block means hide them, single tokens do not
        strength = torch.rand(heads, len(GROUPS), generator=generator) + torch.tensor([1.0, 1.0, 1.0, 0.6])
        self.weights = strength.repeat_interleave(width, dim=1)
        rotation = torch.linalg.qr(torch.randn(heads, head_dim, head_dim, generator=generator)).Q
        # channels that all keys and queries share, but that say nothing about where to look
        self.mislead = 1.5 * torch.randn(heads, 1, 2, generator=generator)
        self.rotation, self.to_v = (
            rotation,
            torch.randn(heads, head_dim, head_dim, generator=generator) / math.sqrt(head_dim),
        )

    def sample(self, seed, *, batch=1):
        generator = torch.Generator().manual_seed(seed)
        videos = [self._tokens(generator) for _ in range(batch)]
        x = torch.stack(videos)[:, None]
        sharp = 2.2 * x * self.weights[:, None]
        q, k = sharp.clone(), sharp.clone()
        # q and k of the noise channels are unrelated, yet their block means are far from zero
        drift = torch.randn(batch, self.heads, self._count() // 64 + 1, 2, generator=generator)
        drift = drift.repeat_interleave(64, dim=2)[:, :, : self._count()]
        q[..., -2:] = drift * self.mislead * self._signs(generator)
        k[..., -2:] = drift.flip(2) * self.mislead
        v = x @ self.to_v + 0.1 * torch.randn(batch, self.heads, self._count(), self.head_dim, generator=generator)
        return q @ self.rotation, k @ self.rotation, v

    def _count(self):
        return math.prod(self.grid)

    def _signs(self, generator):
        """Alternating signs: within a query block the misleading channel cancels only in part."""
        return (torch.rand(self._count(), 1, generator=generator) < 0.7).float() * 2 - 1

    def _tokens(self, generator):
        """One video's features, (N, D): D / 4 channels per group, raster order."""
        t, y, x = (axis.reshape(-1, 1) for axis in torch.meshgrid(*(torch.arange(n) for n in self.grid), indexing="ij"))
        centre = torch.rand(self.objects, 2, generator=generator)
        speed = 0.1 * torch.randn(self.objects, 2, generator=generator)
        at = torch.cat([y / self.grid[1], x / self.grid[2]], dim=1)[:, None] - (centre + speed * t[..., None])
        near = at.square().sum(dim=-1)
        shown = torch.where(near.amin(dim=1) < 0.03, near.argmin(dim=1), self.objects)
        width = self.head_dim // len(GROUPS)
        turns = torch.arange(1, width // 2 + 1) / 4
        phase = (
            torch.cat([(t / self.grid[0] + y / self.grid[1]) * turns, (x / self.grid[2]) * turns], dim=1) * 2 * math.pi
        )
        texture = torch.sin(x * 2.1 + torch.arange(width)) + torch.cos(y * 1.3 + torch.arange(width))
        noise = torch.randn(self._count(), width, generator=generator)
        position = torch.sin(phase) + torch.cos(phase)
        return torch.cat([self.embedding[shown], position, texture, noise], dim=1)


def synthetic_captures(count, *, layers=2, first_seed=0, grid=(8, 16, 32), device="cpu"):
    """``count`` inputs of each of some synthetic layers, (1, 2, N, 32)."""
    models = [SyntheticLayer(layer, grid=grid) for layer in range(layers)]
    return [
        Capture(layer, *(x.to(device) for x in model.sample(first_seed + i)), grid)
        for i in range(count)
        for layer, model in enumerate(models)
    ]
