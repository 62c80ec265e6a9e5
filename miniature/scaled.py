"""The second miniature world: one scene at every size, scaled with the picture's height.

A clip of 208 x 128 shows what one of 832 x 480 shows, so that layout, number and motion can be learned where a clip costs a
hundredth. Positions reach the transformer through RoPE alone; `rope_scale` spreads the tokens of a small picture over the
distances that they have at 480 pixels (ComfyUI: the stock node ScaleROPE). The objects never meet: "bounce" moves each
up and down in its own half, "circle" moves both on opposite sides of one circle. Size and speed hardly vary; where the objects
start, which way they go and spin, and the floor are the seed's.
"""

from __future__ import annotations

import math

import torch

from .captions import Caption
from .videos import Scenes, draws, floor_waves

FULL_HEIGHT = 480  # pixels: where RoPE is as ComfyUI has it
RADIUS = 0.15  # mean, in heights
FLOOR_SCALE = 1.6 / FULL_HEIGHT  # of the first world's periods in pixels


def rope_scale(height: int) -> float:
    """Distance of neighbouring tokens along both axes of a picture of this height, in tokens of one of 480 pixels."""
    return FULL_HEIGHT / height


def mean_radius(height: int, width: int) -> float:
    """Mean radius of the objects in pixels; they differ from it by at most 5%."""
    return RADIUS * height


def simulate(captions: list[Caption], *, frames: int, height: int, width: int, seed: int) -> Scenes:
    """One scene per caption, on the CPU; equal seeds give equal scenes, and at another size the same ones, scaled.

    Args: as videos.simulate(); width at least height.
    """
    if width < height:
        raise ValueError(f"{width}x{height}: this world is at least as wide as it is high, swap width and height")
    n = len(captions)
    uniform, sign = draws(n, seed)
    kind = torch.tensor([caption.indices() for caption in captions]).reshape(n, 5)
    time = torch.arange(frames)[None, :, None]
    aspect = width / height
    # In heights from here on.
    radius = RADIUS * uniform(0.95, 1.05, 2)
    angle = uniform(0.0, 2 * math.pi, 2)[:, None] + (uniform(0.0145, 0.0155, 2) * sign(2))[:, None] * time
    bounce = _bounce(time, radius, aspect, uniform(-0.03, 0.03, 2), uniform(0.0, 2.0, 2), uniform(0.0122, 0.0128, 2))
    circle = _circle(
        time, aspect, uniform(-0.01, 0.01, 2), uniform(0.0, 2 * math.pi, 1), uniform(0.044, 0.046, 1) * sign(1)
    )
    position = torch.where((kind[:, 2] == 0)[:, None, None, None], bounce, circle)
    direction = torch.tensor([0.0, 1.0, -1.0])[kind[:, 4]]
    return Scenes(
        kind=kind,
        position=position * height,
        angle=angle,
        radius=radius * height,
        pan=direction * uniform(0.0058, 0.0062) * height,
        floor_wave=floor_waves(kind[:, 3], uniform(0.0, 1.0, 4, 2)) / (FLOOR_SCALE * height),
        floor_phase=uniform(0.0, 2 * math.pi, 4),
        brightness=uniform(0.92, 1.06),
    )


def _bounce(time, radius, aspect: float, aside, phase, speed) -> torch.Tensor:
    """(N, F, 2, 2): each object up and down in the middle of its half, `aside` of it, from `phase` (0 to 2, a turn) on."""
    room = 1 - 2 * radius
    turn = (phase[:, None] + speed[:, None] * time / room[:, None]) % 2
    y = radius[:, None] + room[:, None] * torch.minimum(turn, 2 - turn)
    x = (torch.tensor([0.25, 0.75]) * aspect + aside)[:, None].expand_as(y)
    return torch.stack([x, y], -1)


def _circle(time, aspect: float, centre, phase, turn) -> torch.Tensor:
    """(N, F, 2, 2): both objects on one circle in the middle of the picture, opposite each other."""
    theta = phase[:, None] + turn[:, None] * time + torch.tensor([0.0, math.pi])
    middle = torch.tensor([aspect / 2, 0.5]) + centre
    return middle[:, None, None] + 0.27 * torch.stack([theta.cos(), theta.sin()], -1)
