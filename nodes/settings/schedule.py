"""Sparsity per step and layer: a short text of rules, and which sparsity a call gets from them.

A rule names its steps by shares of the whole sampling from noise ("0%-20%"), or by number from 1 ("step 1", "steps 2-4"). Numbers
count in the sampler that begins with noise: one that goes on from there, as the second of Wan 2.2's two, has none.
"""

import math
import re
from bisect import bisect_left
from dataclasses import dataclass

import torch

from .values import FULL_WIDTH, check_layers

FORM = '"0%-20%: dense; 20%-100%: 0.8 -> 0.97; layers 0-3: 0.85"'
NUMBER = r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)"  # no digits of other scripts: web/js/schedule.js reads the same
MAX_CHARACTERS = 300  # of one rule
STEPS = re.compile(rf"{NUMBER}\s*%\s*-\s*{NUMBER}\s*%")
NUMBERED = re.compile(r"steps?\s+([0-9]{1,5})(?:\s*-\s*([0-9]{1,5}))?")
LAYERS = re.compile(r"layers?\s+(.+)")
SAME_SIGMA = 1e-4
VALUE = re.compile(rf"{NUMBER}(?:\s*->\s*{NUMBER})?")


@dataclass(frozen=True)
class Rule:
    """sparsity: (at the first step, at the last step) of the range, None where it is dense. steps: shares of the run.

    numbers: (first, last) step, in place of ``steps``.
    """

    sparsity: tuple[float, float] | None
    steps: tuple[float, float] = (0.0, 1.0)
    layers: frozenset[int] | None = None
    numbers: tuple[int, int] | None = None

    def covers(self, layer, progress, step=None):
        if self.layers is not None and layer not in self.layers:
            return False
        if self.numbers is not None:
            return step is not None and self.numbers[0] <= step <= self.numbers[1]
        return self.steps == (0.0, 1.0) or (progress is not None and self.steps[0] <= progress <= self.steps[1])

    def at(self, progress, step=None):
        if self.sparsity is None:
            return None
        first, last = self.sparsity
        (start, end), place = (self.steps, progress) if self.numbers is None else (self.numbers, step)
        if first == last or start == end or place is None:
            return first
        share = min(max((place - start) / (end - start), 0.0), 1.0)
        return round(first + (last - first) * share, 2)  # few values, so that few sets of weights are kept


def sparsity_of(rules, layer, progress, otherwise, step=None):
    """Sparsity of a call, None for dense: that of the last rule that covers it, else ``otherwise``.

    progress: 0 to 1, step: from 1; each None where it is not known.
    """
    rule = next((rule for rule in reversed(rules) if rule.covers(layer, progress, step)), None)
    return otherwise if rule is None else rule.at(progress, step)


def needs_progress(rules):
    shares = [rule for rule in rules if rule.numbers is None]
    return any(rule.steps != (0.0, 1.0) or (rule.sparsity and len(set(rule.sparsity)) > 1) for rule in shares)


def needs_numbers(rules):
    return any(rule.numbers is not None for rule in rules)


def parse_schedule(text, num_layers, parse_layers):
    """Rules separated by ";" or line ends, in order; raises ValueError with one sentence. parse_layers: see settings.py."""
    text = text.replace("\ufeff", " ").translate(FULL_WIDTH)
    parts = [part.strip() for part in re.split(r"[;\n]", text)]
    return tuple(_parse_rule(part, num_layers, parse_layers) for part in parts if part)


def check_schedule(text):
    """Raises the sentence of parse_schedule for a text that no model can have, whatever its number of layers."""
    parse_schedule(text, None, lambda layers, _, where: check_layers(layers, where))


def _parse_rule(part, num_layers, parse_layers):
    if len(part) > MAX_CHARACTERS:
        raise ValueError(f"schedule holds a rule of {len(part)} characters: at most {MAX_CHARACTERS} are allowed.")
    where, colon, what = part.rpartition(":")
    if not colon:
        raise ValueError(f"schedule must look like {FORM}, but {part!r} has no colon.")
    steps, numbers, layers = (0.0, 1.0), None, None
    rest = where.strip()
    by_share = STEPS.search(rest)
    found = by_share or NUMBERED.search(rest)
    if by_share:
        steps = tuple(float(number) / 100 for number in found.groups())
    elif found:
        numbers = int(found[1]), int(found[2] or found[1])
    if found:
        rest = (rest[: found.start()] + rest[found.end() :]).strip(" ,")
    found = LAYERS.fullmatch(rest)
    if found:
        layers, rest = parse_layers(found[1], num_layers, "schedule"), ""
    if rest or not where.strip():
        raise ValueError(f"schedule must look like {FORM}, but {where.strip()!r} is no range of steps or layers.")
    if not 0 <= steps[0] < steps[1] <= 1:
        raise ValueError(f"schedule holds the steps {where.strip()!r}: they must rise and lie between 0% and 100%.")
    if numbers and not 1 <= numbers[0] <= numbers[1]:
        raise ValueError(f"schedule holds the steps {where.strip()!r}: they count from 1 and must rise.")
    return Rule(_parse_value(what.strip()), steps, layers, numbers)


def _parse_value(text):
    if text == "dense":
        return None
    found = VALUE.fullmatch(text)
    values = [float(number) for number in found.groups() if number is not None] if found else []
    if not values or not all(0 <= value < 1 for value in values):
        raise ValueError(f'schedule needs "dense" or a sparsity of at least 0 and below 1, got {text!r}.')
    return values[0], values[-1]


class StepNumbers:
    """Number of a sampling step, from 1, by its sigma. goes_on: this sampler goes on with what another one began."""

    def __init__(self, goes_on=False):
        self.goes_on = goes_on
        self._memo = (None, ())

    def at(self, sigma, sample_sigmas):
        """None where the number is not known. sample_sigmas: of all steps of this sampler, and its end; read once."""
        if self.goes_on or sample_sigmas is None:
            return None
        known, sigmas = self._memo
        if known is not sample_sigmas:
            sigmas = sample_sigmas.tolist()[:-1]
            self._memo = (sample_sigmas, sigmas)
        for number, own in enumerate(sigmas, 1):
            if math.isclose(own, sigma, rel_tol=1e-6):
                return number
        # between two steps, as samplers of second order ask
        return max((number for number, own in enumerate(sigmas, 1) if own > sigma), default=1)


def goes_on(noise, sigmas, sigma_max):
    """Whether a sampler that was given this noise and these sigmas goes on with a latent that another one has begun.

    One that is not given tensors begins: a guider of another pack may take other arguments.
    """
    if not all(isinstance(given, torch.Tensor) for given in (noise, sigmas)) or noise.any():
        return False
    return float(sigmas[0]) < float(sigma_max) * (1 - SAME_SIGMA)


class RunProgress:
    """Share of the sampling, 0 to 1, from a step's sigma, as ComfyUI's start_percent counts it."""

    POINTS = 200

    def __init__(self, percent_to_sigma):
        self._percents = [number / self.POINTS for number in range(self.POINTS, -1, -1)]
        self._sigmas = [float(percent_to_sigma(percent)) for percent in self._percents]

    def at(self, sigma):
        if sigma >= self._sigmas[-1]:
            return 0.0
        above = bisect_left(self._sigmas, sigma)
        if above == 0:
            return 1.0
        low, high = self._sigmas[above - 1], self._sigmas[above]
        share = (sigma - low) / (high - low) if high > low else 1.0
        return self._percents[above - 1] + share * (self._percents[above] - self._percents[above - 1])
