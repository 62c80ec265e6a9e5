"""Videos of scenes: two objects over a textured floor under a moving camera. scaled.py says how they move.

Scenes are rendered on any device at any window and time span. Every pixel is a closed formula of its position, so a crop
costs no more than its own pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

COLOUR_VALUES = ((0.86, 0.18, 0.16), (0.95, 0.80, 0.18), (0.20, 0.66, 0.28), (0.18, 0.36, 0.86))
# Two shades per floor, all muted so that the four object colours stand out on each.
FLOOR_VALUES = (
    ((0.80, 0.76, 0.68), (0.56, 0.52, 0.47)),
    ((0.30, 0.45, 0.48), (0.55, 0.68, 0.68)),
    ((0.42, 0.38, 0.52), (0.74, 0.72, 0.80)),
)
FLOOR_WAVES = 4


@dataclass(frozen=True)
class Scenes:
    """N simulated scenes. Lengths are pixels, angles radians, times frames; positions are (x, y) on the screen."""

    kind: torch.Tensor  # (N, 5) int64, Caption.indices()
    position: torch.Tensor  # (N, F, 2 objects, 2)
    angle: torch.Tensor  # (N, F, 2)
    radius: torch.Tensor  # (N, 2)
    pan: torch.Tensor  # (N,) floor shift per frame
    floor_wave: torch.Tensor  # (N, 4, 2) wave vectors of the floor, radians per pixel
    floor_phase: torch.Tensor  # (N, 4)
    brightness: torch.Tensor  # (N,)

    def __len__(self) -> int:
        return self.kind.shape[0]

    def select(self, index: torch.Tensor) -> Scenes:
        """The scenes at these positions."""
        return Scenes(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def to(self, device: torch.device | str) -> Scenes:
        return Scenes(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def draws(n: int, seed: int) -> tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]:
    """(uniform(low, high, *shape), sign(*shape)): random numbers (n, *shape), one after the other from this seed."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(n, *shape, generator=generator) * (high - low) + low

    def sign(*shape: int) -> torch.Tensor:
        return torch.randint(0, 2, (n, *shape), generator=generator).float() * 2 - 1

    return uniform, sign


def floor_waves(floor: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    """(N, 4, 2) wave vectors: two axes for tiles, a slanted wave with a slow bend for waves, four slow ones for clouds."""
    n = floor.shape[0]
    period = torch.empty(n, FLOOR_WAVES)
    heading = torch.empty(n, FLOOR_WAVES)
    turn = 2 * math.pi
    period[:] = 90.0 + 110.0 * random[..., 0]
    heading[:] = turn * (random[..., 1] + torch.arange(FLOOR_WAVES)) / FLOOR_WAVES
    tiles, waves = floor == 0, floor == 1
    period[tiles, :2] = 80.0 + 40.0 * random[tiles, :1, 0]
    heading[tiles, 0], heading[tiles, 1] = 0.0, turn / 4
    period[waves, 0], period[waves, 1] = 44.0 + 20.0 * random[waves, 0, 0], 190.0
    heading[waves, 0] = (random[waves, 0, 1] - 0.5) * 1.6
    heading[waves, 1] = heading[waves, 0] + turn / 4
    length = turn / period
    return torch.stack([heading.cos() * length, heading.sin() * length], -1)


def render(
    scenes: Scenes,
    *,
    first_frame: torch.Tensor | int = 0,
    frames: int,
    origin: torch.Tensor | None = None,
    height: int,
    width: int,
) -> torch.Tensor:
    """(N, 3, frames, height, width) float32 video in [-1, 1], on the scenes' device.

    Args:
        scenes: from scaled.simulate().
        first_frame: start time, one for all or (N,) int64; first_frame + frames must not pass the simulated span.
        frames, height, width: extent of the window.
        origin: (N, 2) top-left corner of the window as (x, y) pixels; None is (0, 0).
    """
    device, n = scenes.position.device, len(scenes)
    start = torch.as_tensor(first_frame, device=device).expand(n)
    moment = start[:, None] + torch.arange(frames, device=device)
    pick = torch.arange(n, device=device)[:, None]
    corner = torch.zeros(n, 2, device=device) if origin is None else origin.to(device, torch.float32)
    x = (corner[:, 0, None] + torch.arange(width, device=device))[:, None, None, :]
    y = (corner[:, 1, None] + torch.arange(height, device=device))[:, None, :, None]

    floor_x = x + (scenes.pan[:, None] * moment)[:, :, None, None]
    image = _floor(scenes, floor_x, y)
    colour = torch.tensor(COLOUR_VALUES, device=device)[scenes.kind[:, 0]]
    for item in (1, 0):
        at = scenes.position[pick, moment, item]
        turn = scenes.angle[pick, moment, item][..., None, None]
        radius = scenes.radius[:, item, None, None, None]
        dx, dy = x - at[..., 0, None, None], y - at[..., 1, None, None]
        u = (dx * turn.cos() + dy * turn.sin()) / radius
        v = (dy * turn.cos() - dx * turn.sin()) / radius
        cover = (0.5 - _distance(scenes.kind[:, 1, None, None, None], u, v) * radius).clamp(0, 1)
        # One half is darker than the other: without it a spinning ball would look still.
        shade = 0.78 + 0.22 * torch.tanh(4 * u)
        image = image + cover[:, None] * (colour[:, :, None, None, None] * shade[:, None] - image)
    return (image * scenes.brightness[:, None, None, None, None]).clamp(0, 1) * 2 - 1


def _floor(scenes: Scenes, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(N, 3, F, H, W) colour in [0, 1] of the floor at world positions x (N,F,1,W) and y (N,1,H,1)."""
    wave = [
        x * scenes.floor_wave[:, i, 0, None, None, None]
        + y * scenes.floor_wave[:, i, 1, None, None, None]
        + scenes.floor_phase[:, i, None, None, None]
        for i in range(FLOOR_WAVES)
    ]
    floor = scenes.kind[:, 3, None, None, None]
    tiles = torch.tanh(6 * wave[0].sin() * wave[1].sin())
    waves = (wave[0] + 0.7 * wave[1].sin()).sin()
    clouds = 0.5 * sum(w.sin() for w in wave)
    level = torch.where(floor == 0, tiles, torch.where(floor == 1, waves, clouds)).clamp(-1, 1) * 0.5 + 0.5
    shades = torch.tensor(FLOOR_VALUES, device=x.device)[scenes.kind[:, 3]]
    low, high = shades[:, 0, :, None, None, None], shades[:, 1, :, None, None, None]
    return low + level[:, None] * (high - low)


def _distance(shape: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Signed distance (in radii, negative inside, approximate for stars) to the outline of each shape."""
    length = (u * u + v * v).sqrt()
    ball = length - 0.95
    box = torch.maximum(u.abs(), v.abs()) - 0.78
    star = (length - 0.72 - 0.26 * torch.cos(5 * torch.atan2(v, u))) * 0.7
    return torch.where(shape == 0, ball, torch.where(shape == 1, box, star))
