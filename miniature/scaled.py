"""The miniature's world: one scene at every size, scaled with the picture's height.

A clip of 208 x 128 shows what one of 832 x 480 shows, so that layout, number and motion can be learned where a clip costs
a hundredth. Positions reach the transformer through RoPE alone; `rope_scale` spreads the tokens of a small picture over
the distances that they have at 480 pixels (ComfyUI: the stock node ScaleROPE). The objects never meet: "bounce" moves one
up and down in each half, as springs do, released at rest, one at the top and the other at the bottom; "circle" moves both
on opposite sides of one circle, from side by side or from one above the other. All have one size and turn by the same angle
in every clip, so that an outline is known as soon as its place is. Which object begins at the top, which of the two starts
a circle has and which way round it goes, how bright it is and where the pattern of the floor lies are the seed's.
"""

from __future__ import annotations

import math

import torch

from .captions import Caption
from .videos import Scenes, draws, floor_waves

FULL_HEIGHT = 480  # pixels: where RoPE is as ComfyUI has it
RADIUS = 0.15  # of every object, in heights
SPIN = 0.015  # radians a frame
TURN = 0.045  # radians a frame of either motion's period
FLOOR_SCALE = 1.6 / FULL_HEIGHT  # of floor_waves()'s periods in pixels
# what floor_waves() makes the periods (first of each pair) and directions of its four waves from
FLOOR_DRAWS = ((0.5, 0.5), (0.1, 0.4), (0.9, 0.7), (0.3, 0.2))


def rope_scale(height: int) -> float:
    """Distance of neighbouring tokens along both axes of a picture of this height, in tokens of one of 480 pixels."""
    return FULL_HEIGHT / height


def mean_radius(height: int, width: int) -> float:
    """Radius of the objects in pixels."""
    return RADIUS * height


def simulate(captions: list[Caption], *, frames: int, height: int, width: int, seed: int) -> Scenes:
    """One scene per caption, on the CPU; equal seeds give equal scenes, and at another size the same ones, scaled.

    Args:
        frames, height, width: in pixels; width at least height.
    """
    if width < height:
        raise ValueError(f"{width}x{height}: this world is at least as wide as it is high, swap width and height")
    n = len(captions)
    uniform, sign = draws(n, seed)
    kind = torch.tensor([caption.indices() for caption in captions]).reshape(n, 5)
    time = torch.arange(frames)
    # In heights from here on.
    aspect = width / height
    bounce = _bounce(time, aspect, uniform(-0.03, 0.03, 2), sign())
    circle = _circle(time, aspect, uniform(-0.01, 0.01, 2), math.pi / 4 * (1 + sign()), TURN * sign())
    position = torch.where((kind[:, 2] == 0)[:, None, None, None], bounce, circle)
    direction = torch.tensor([0.0, 1.0, -1.0])[kind[:, 4]]
    return Scenes(
        kind=kind,
        position=position * height,
        angle=(SPIN * time)[None, :, None].expand(n, -1, 2).contiguous(),
        radius=torch.full((n, 2), RADIUS * height),
        pan=0.006 * direction * height,
        floor_wave=floor_waves(kind[:, 3], torch.tensor(FLOOR_DRAWS).expand(n, -1, -1)) / (FLOOR_SCALE * height),
        floor_phase=uniform(0.0, 2 * math.pi, 4),
        brightness=uniform(0.92, 1.06),
    )


def _bounce(time, aspect: float, aside, first) -> torch.Tensor:
    """(N, F, 2, 2): an object up and down in the middle of each half, `aside` of it, opposite each other; the left one
    begins at the bottom where `first`, (N,), is 1, and at the top where it is -1."""
    height = (0.5 - RADIUS) * first[:, None] * (TURN * time).cos()
    y = 0.5 + torch.stack([height, -height], -1)
    x = (torch.tensor([0.25, 0.75]) * aspect + aside)[:, None].expand_as(y)
    return torch.stack([x, y], -1)


def _circle(time, aspect: float, centre, phase, turn) -> torch.Tensor:
    """(N, F, 2, 2): both objects on one circle in the middle of the picture, opposite each other; phase, turn (N,)."""
    theta = (phase[:, None] + turn[:, None] * time)[..., None] + torch.tensor([0.0, math.pi])
    middle = torch.tensor([aspect / 2, 0.5]) + centre
    return middle[:, None, None] + 0.27 * torch.stack([theta.cos(), theta.sin()], -1)
