"""The ways to sample that stage 2's steps train in turns: the configured loss, with guidance, with distilled few-step LoRAs.

Guidance multiplies the error that sparse attention adds, and a few-step LoRA moves the model to other weights. A LoRA that
was trained on the plain model alone has seen neither.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..draws import shifted
from .lora import plain_weights, read_lora


def schedule(steps, shift):
    """(steps + 1,) noise levels of sampling, float32, from 1 to 0, evenly spaced before the shift towards noise."""
    return shifted(torch.linspace(1, 0, steps + 1), shift)


def euler(velocity, x, levels):
    """x (B, ...) at the last of these noise levels, floats, by a step from each to the next; velocity(x, t), t (B,)."""
    for level, following in itertools.pairwise(levels):
        x = x + (following - level) * velocity(x, torch.full((len(x),), level, device=x.device))
    return x


@dataclass(frozen=True, eq=False)
class Way:
    """A way to sample. name: for messages.

    levels: (n,) float32, the noise levels of its steps; None: by the configured loss, at the levels that are drawn for it.
    sampled: trains on what the model's own steps make of noise, instead of videos with noise.
    guidance: its scale, 1 is none. lora: what read_lora() returns, merged while it trains, or None.
    """

    name: str
    levels: Tensor | None = None
    guidance: float = 1.0
    lora: dict | None = None
    sampled: bool = False

    @property
    def by_loss(self):
        return self.levels is None

    def rows(self, indices, levels, dropped, seeds, turn):
        """What drawn() returned for some videos, each (n,), as this way trains them: always with their caption.

        Guided, the first half of the videos, rounded up, two rows each: with the caption, and without.
        Sampled, all at the level of this turn of the way: the model takes them there in as many calls.
        """
        if self.by_loss:
            return indices, levels, dropped, seeds
        level = torch.full_like(seeds, turn) if self.sampled else seeds
        levels, dropped = self.levels[level % len(self.levels)], torch.zeros_like(dropped)
        if self.guidance != 1:
            half = -(-len(indices) // 2)
            indices, levels, seeds = (x[:half].repeat_interleave(2) for x in (indices, levels, seeds))
            dropped = torch.arange(2 * half) % 2 == 1
        return indices, levels, dropped, seeds

    def levels_to(self, turn):
        """The noise levels from the first to that of rows() in this turn."""
        return self.levels[: turn % len(self.levels) + 1].tolist()

    def error(self, error):
        """What errors of the velocities of rows() (n, ...) become in sampling: (n, ...), guided (n / 2, ...)."""
        if self.guidance == 1:
            return error
        scale = self.guidance
        # as large as the mean square of both, where they are independent
        return (scale * error[::2] - (scale - 1) * error[1::2]) / (scale**2 + (scale - 1) ** 2) ** 0.5


class Turns:
    """Which way a step trains, and the model's weights, which are that way's: step n takes way n mod their number.

    The first way is the configured loss on the model as it was. Of weights that a LoRA changes, a copy is kept.

    Args:
        config: Stage2Config. model: the student's, on the device that it trains on.

    Raises:
        ValueError: a LoRA file cannot be read, or is not this model's.
    """

    def __init__(self, config, model):
        weights = plain_weights(model)
        self.ways = tuple(_ways_of(config, weights))
        changed = dict.fromkeys(name for way in self.ways for name in way.lora or ())
        self.weights = {name: weights[name] for name in changed}
        self.kept = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.now, self.merged = self.ways[0], None

    @property
    def names(self):
        return [way.name for way in self.ways]

    def of(self, step):
        return self.ways[step % len(self.ways)]

    def number(self, step):
        """How many steps of its way a step has before it."""
        return step // len(self.ways)

    def take(self, way):
        """Makes the weights those of ``way``."""
        if way.lora is not self.merged:
            self._merge(way.lora)
        self.now = way

    def end(self):
        """Makes the weights the model's own, bit by bit."""
        self.take(self.ways[0])

    @torch.no_grad()
    def _merge(self, lora):
        self.merged = ()  # neither, should memory run out on the way
        for name, own in self.kept.items():
            addition = lora.get(name) if lora else None
            self.weights[name].copy_(own if addition is None else addition.added_to(own))
        self.merged = lora


def _ways_of(config, weights):
    yield Way(config.loss)
    if config.guidance != 1:
        levels = schedule(config.sampling_steps, config.sampling_shift)[:-1]
        yield Way(f"guidance {config.guidance:g}", levels, config.guidance)
    for steps, path in config.few_step_loras.items():
        levels = schedule(int(steps), config.sampling_shift)[:-1]
        yield Way(f"{steps} steps", levels, lora=read_lora(path, weights), sampled=config.few_step_states == "sampled")
