"""Optimisation steps of a LoRA and the mixing ratios that go with it: schedule, clipping, and a state known to be good."""

import math

import torch

from .draws import learning_rate_factor
from .errors import TrainingError
from .optimisers import optimisers, take_step

RATIO_LEARNING_RATE = 1e-2
MAX_NORM = 1.0
WARMUP = 20


class FineTuning:
    """Steps of LoRA weights (matrices) and ratio logits, float32 parameters on any device.

    lora, ratios: lists of parameters. steps: there will be. learning_rate: of the LoRA at its height.
    optimiser: of optimisers.OPTIMISERS.
    losses: one number per step done.
    """

    def __init__(
        self, lora, ratios, *, steps, learning_rate, ratio_learning_rate=RATIO_LEARNING_RATE, optimiser="adamw"
    ):
        self.parameters = [*lora, *ratios]
        self.steps, self.warmup = steps, min(WARMUP, steps // 10)
        self.losses = []
        self.known_good = self._copies()
        self.optimisers = optimisers(optimiser, lora, ratios, learning_rate, ratio_learning_rate)

    @property
    def done(self):
        return len(self.losses)

    def update(self, loss):
        """One step with the gradients that lie in the parameters. loss: the number that they belong to.

        Raises TrainingError where loss or gradient is not finite; the parameters are then those of the last finite loss.
        """
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, MAX_NORM))
        self.require_finite(loss, "loss")
        self.require_finite(norm, "gradient")
        self.known_good = self._copies()
        take_step(self.optimisers, learning_rate_factor(self.done, self.steps, self.warmup))
        self.losses.append(loss)

    def require_finite(self, number, what):
        """Raises TrainingError where ``number`` is not finite, after restoring the parameters of the last finite loss."""
        if math.isfinite(number):
            return
        step = self.done
        self._go_back()
        raise TrainingError(
            f"Training stopped at step {step}: the {what} is not finite. "
            "Lower learning_rate, or leave out the video that causes it."
        )

    @torch.no_grad()
    def _go_back(self):
        """One step less is done, if any was."""
        for parameter, copy in zip(self.parameters, self.known_good, strict=True):
            parameter.copy_(copy)
            parameter.grad = None
        self.losses = self.losses[:-1]

    def _copies(self):
        return [parameter.detach().clone() for parameter in self.parameters]
