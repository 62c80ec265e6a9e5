"""A plain image test of a miniature video: are there two objects of the caption's colour and shape in every frame?

No model is involved. Object colours are far more saturated than any floor, so the coloured pixels of a frame are its
objects; eroded by a third to a half of an object's radius they fall into one core per object, also where two objects touch. Each
core takes back the coloured pixels nearest to it, and the outline around its centre tells balls, boxes and stars apart.
Rendered scenes pass (tests/miniature/test_objects.py), videos whose objects merge, vanish, split, jump or change colour fail.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .captions import SHAPES, Caption
from .scaled import mean_radius
from .videos import COLOUR_VALUES

CHECKS = ("count", "colour", "shape", "size", "steady")
PASS_SHARE = 0.95  # of the frames of a video that must pass every check

SATURATION = 0.5  # of (max - min) / max: floors have at most 0.38, objects at least 0.70
WORK_RADIUS = 14.0  # pixels: frames are shrunk until a mean object has about this radius
CORE = {"balls": 0.5, "boxes": 0.4, "stars": 0.33}  # erosion before counting, in mean radii
FRAGMENTS = 0.12  # most coloured area outside both objects, in areas of a mean ball
OTHER_COLOUR = 0.08  # most of the coloured area that may have another object colour
SIZE_CHANGE = 0.35  # most an object's area may differ from its median over the video
SIZE_RANGE = (0.55, 1.6)  # of a mean object of that shape
JUMP = 0.5  # most an object's centre may move between two frames, in mean radii
SECTORS = 24
STAR, BOX = 0.14, 0.055  # fifth and fourth harmonic of the outline, as shares of its mean radius
AREAS = {"balls": 2.835, "boxes": 2.434, "stars": 1.735}  # in squared radii, from the outlines in videos.py


@dataclass(frozen=True)
class Verdict:
    """What the test found in one video. frames: check -> (F,) bool. counts: (F,) objects per frame."""

    frames: dict[str, torch.Tensor]
    counts: torch.Tensor

    @property
    def share(self) -> float:
        """Share of the frames that pass every check."""
        return float(torch.stack(list(self.frames.values())).all(0).float().mean())

    @property
    def passed(self) -> bool:
        return self.share >= PASS_SHARE

    def shares(self) -> dict[str, float]:
        """Share of the frames that pass, per check."""
        return {check: float(good.float().mean()) for check, good in self.frames.items()}


@torch.no_grad()
def examine(video: torch.Tensor, caption: Caption) -> Verdict:
    """Test every frame of a video against its caption.

    Args:
        video: (3, F, H, W) in [-1, 1], on any device; a whole scene, not a crop, because sizes are judged by H and W.
        caption: what the video should show.
    """
    if video.dim() != 4 or video.shape[0] != 3:
        raise ValueError(f"video has shape {tuple(video.shape)}, examine() needs (3, frames, height, width)")
    radius = mean_radius(video.shape[2], video.shape[3])
    shrink = max(1, round(radius / WORK_RADIUS))
    radius /= shrink
    coloured, right = (F.avg_pool2d(m[:, None].float(), shrink)[:, 0] for m in _coloured_pixels(video, caption))
    labels = _grow(_components(_erode(coloured > 0.5, CORE[caption.shape] * radius)), coloured > 0.25)
    counts, first, second = _two_largest(labels)
    objects = [_describe(coloured * (labels == label[:, None, None])) for label in (first, second)]
    area = torch.stack([o["area"] for o in objects], 1)
    centre = torch.stack([o["centre"] for o in objects], 1)
    total = coloured.sum((1, 2))
    whole = area.sum(1)
    ball = AREAS["balls"] * radius**2
    frames = {
        "count": (counts == 2) & (total - whole <= FRAGMENTS * ball),
        "colour": (total > 0) & (total - right.sum((1, 2)) <= OTHER_COLOUR * total),
        "shape": torch.stack([o["shape"] == SHAPES.index(caption.shape) for o in objects], 1).all(1) & (counts == 2),
        "size": _same_size(area, AREAS[caption.shape] * radius**2) & (counts == 2),
        "steady": _steady(centre, JUMP * radius) & (counts == 2),
    }
    return Verdict({check: good.cpu() for check, good in frames.items()}, counts.cpu())


def _coloured_pixels(video: torch.Tensor, caption: Caption) -> tuple[torch.Tensor, torch.Tensor]:
    """(F, H, W) bool twice: pixels of any object colour, and of the caption's."""
    rgb = ((video.float().clamp(-1, 1) + 1) / 2).transpose(0, 1)
    high, low = rgb.amax(1), rgb.amin(1)
    coloured = (high - low > SATURATION * high) & (high > 0.12)
    hues = torch.tensor(COLOUR_VALUES, device=video.device)
    hues = (hues - hues.amin(1, keepdim=True)) / (hues.amax(1, keepdim=True) - hues.amin(1, keepdim=True))
    hue = (rgb - low[:, None]) / (high - low).clamp_min(1e-4)[:, None]
    distance = torch.stack([(hue - h.view(1, 3, 1, 1)).abs().sum(1) for h in hues])
    return coloured, coloured & (distance.argmin(0) == caption.indices()[0])


def _erode(mask: torch.Tensor, radius: float) -> torch.Tensor:
    """Pixels of (F, H, W) whose disc of this radius lies inside the mask; outside the picture counts as inside."""
    reach = math.ceil(radius)
    offset = torch.arange(-reach, reach + 1, device=mask.device)
    disc = (offset[:, None] ** 2 + offset[None] ** 2 <= radius**2).float()
    missing = F.conv2d((~mask[:, None]).float(), disc[None, None], padding=reach)
    return missing[:, 0] < 0.5


def _components(mask: torch.Tensor) -> torch.Tensor:
    """(F, H, W) float labels of the 8-connected parts, 0 outside; numbers are unique within a frame."""
    frames, height, width = mask.shape
    labels = torch.arange(1, height * width + 1, device=mask.device, dtype=torch.float32).view(1, height, width) * mask
    while True:
        spread = F.max_pool2d(labels, 3, 1, 1) * mask
        if torch.equal(spread, labels):
            return labels
        labels = spread


def _grow(labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Labels spread through the mask, in turns one pixel far, until nothing of what they reach is without one."""
    while True:
        spread = torch.where(labels > 0, labels, F.max_pool2d(labels, 3, 1, 1) * mask)
        if torch.equal(spread, labels):
            return labels
        labels = spread


def _two_largest(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(F,) number of labels of each frame, and its two largest by area, the larger first (-1 where there is none)."""
    counts, pairs = [], []
    for frame in labels.flatten(1):
        values, sizes = frame[frame > 0].unique(return_counts=True)
        order = sizes.argsort(descending=True)[:2]
        counts.append(len(values))
        pairs.append([*values[order].tolist(), -1.0, -1.0][:2])
    pairs = torch.tensor(pairs, device=labels.device)
    return torch.tensor(counts, device=labels.device), pairs[:, 0], pairs[:, 1]


def _describe(cover: torch.Tensor) -> dict[str, torch.Tensor]:
    """Area (F,), centre (F, 2) as (x, y), and shape (F,) as an index of SHAPES, of one object's coverage (F, H, W)."""
    frames, height, width = cover.shape
    x = torch.arange(width, device=cover.device).expand(height, width)
    y = torch.arange(height, device=cover.device)[:, None].expand(height, width)
    area = cover.sum((1, 2))
    safe = area.clamp_min(1e-6)
    centre = torch.stack([(cover * x).sum((1, 2)) / safe, (cover * y).sum((1, 2)) / safe], 1)
    angle = torch.atan2(y - centre[:, 1, None, None], x - centre[:, 0, None, None])
    sector = ((angle / (2 * math.pi) + 0.5) * SECTORS).long().clamp(0, SECTORS - 1)
    share = torch.zeros(frames, SECTORS, device=cover.device).scatter_add_(1, sector.flatten(1), cover.flatten(1))
    outline = (2 * share / (2 * math.pi / SECTORS)).sqrt()
    wave = torch.fft.rfft(outline).abs()
    fourth, fifth = (2 * wave[:, n] / wave[:, 0].clamp_min(1e-6) for n in (4, 5))
    names = {name: torch.full_like(area, SHAPES.index(name), dtype=torch.long) for name in SHAPES}
    shape = torch.where(fifth > STAR, names["stars"], torch.where(fourth > BOX, names["boxes"], names["balls"]))
    return {"area": area, "centre": centre, "shape": shape, "fourth": fourth, "fifth": fifth}


def _same_size(area: torch.Tensor, typical: float) -> torch.Tensor:
    """(F,): both areas (F, 2) are near their medians over the video and within the range of the world."""
    median = area.median(0).values.clamp_min(1e-6)
    steady = ((area / median - 1).abs() <= SIZE_CHANGE).all(1)
    return steady & ((area >= SIZE_RANGE[0] * typical) & (area <= SIZE_RANGE[1] * typical)).all(1)


def _steady(centre: torch.Tensor, most: float) -> torch.Tensor:
    """(F,): each of the two centres (F, 2, 2) is where one was a frame before; the first frame always is."""
    gap = (centre[1:, :, None] - centre[:-1, None]).norm(dim=-1)
    straight, crossed = gap[:, [0, 1], [0, 1]].amax(1), gap[:, [0, 1], [1, 0]].amax(1)
    return F.pad(torch.minimum(straight, crossed) <= most, (1, 0), value=True)
