"""What the calls of a LoRA training start from: videos with noise, or where the model's own sparse steps lead."""

from dataclasses import dataclass

import torch

from ...sla2_training.draws import drawn, noise_like

LEVELS = 4  # noise levels of videos that the error is measured at
HELD_OUT = 2**62  # seeds from here on are never drawn
ALL_NOISE = 0.99  # from this sigma on nothing of a video is left


@dataclass(frozen=True, eq=False)
class State:
    """What one call is trained on. noisy (1, C, T, h, w), sigma (1,).

    truth: the true velocity, as noisy; None where no video is behind it. prompt: its number. negative: of the negative prompts.
    """

    noisy: torch.Tensor
    sigma: torch.Tensor
    truth: torch.Tensor | None
    prompt: int
    negative: bool = False


class NoisedVideos:
    """Videos with noise, at levels drawn evenly from the model's schedule.

    sampling: the model's. clean: (N, C, T, h, w) as the model takes them. settings: LoraSettings.
    """

    def __init__(self, sampling, clean, settings):
        self.sampling, self.clean, self.settings = sampling, clean, settings

    def of(self, step):
        """The States of an optimisation step, one after the other; follow() is called with each velocity before the next."""
        for index, level, negative, seed in zip(*drawn(self.settings, step, len(self.clean)), strict=True):
            yield self._at(int(index), float(level), int(seed), bool(negative))

    def held_out(self):
        """States that no step has, to measure on."""
        for number in range(LEVELS):
            yield self._at(0, (number + 0.5) / LEVELS, HELD_OUT + number)

    def first(self):
        """States whose calls estimate the ratios that training starts at."""
        yield self._at(0, 0.5, HELD_OUT)

    def follow(self, state, velocity):
        """velocity: of the sparse model in this state, (1, C, T, h, w)."""

    def _at(self, index, level, seed, negative=False):
        """level: share of the way from no noise to all of it, before any shift."""
        clean = self.clean[index : index + 1]
        noise = noise_like(clean, [seed])
        sigma = torch.tensor([float(self.sampling.percent_to_sigma(1 - level))], device=clean.device)
        noisy = self.sampling.noise_scaling(sigma, noise, clean)
        # at sigma 1 only (scaled) noise is left
        all_noise = self.sampling.noise_scaling(torch.ones_like(sigma), noise, clean)
        return State(noisy, sigma, all_noise - clean, index, negative)


class OwnSteps:
    """One sampling of the sparse model after the other, by Euler's method with guidance: every call trains in its next step.

    Sampling goes on through the optimisation steps, so it needs no calls of its own; with guidance one, of the other prompt.

    sampling, clean, settings: as in NoisedVideos; of clean only the size counts where sigmas begin at 1.
    sigmas: (n + 1,) float32, falling. cfg: scale of guidance, 1 is none.
    velocity(state): the sparse model's.
    """

    def __init__(self, sampling, clean, settings, sigmas, cfg, velocity):
        self.sampling, self.clean, self.settings = sampling, clean, settings
        # a copy: tensors of other nodes are of inference mode, or have gradients of their own
        self.sigmas = sigmas.detach().to(clean.device, torch.float32, copy=True)
        self.cfg, self.velocity = cfg, velocity
        self.noisy = None
        self.number = self.samplings = 0

    def of(self, step):
        _, _, dropped, seeds = drawn(self.settings, step, len(self.clean))
        for negative, seed in zip(dropped, seeds, strict=True):
            if self.noisy is None:
                self._begin(int(seed))
            yield self._state(bool(negative))

    def held_out(self):
        before = self.samplings
        self.samplings = 0  # the first prompt
        self._begin(HELD_OUT)
        while self.noisy is not None:
            yield self._state()
        self.samplings = before

    first = held_out

    @torch.no_grad()
    def follow(self, state, velocity):
        own = velocity.detach()
        if self.cfg != 1:
            other = self.velocity(self._state(not state.negative))
            positive, negative = (other, own) if state.negative else (own, other)
            own = negative + self.cfg * (positive - negative)
        step = self.sigmas[self.number + 1] - self.sigmas[self.number]
        self.number += 1
        self.noisy = state.noisy + step * own
        if self.number + 1 == len(self.sigmas):
            self.noisy = None
            self.samplings += 1

    def _begin(self, seed):
        index = self.samplings % len(self.clean)
        clean = self.clean[index : index + 1]
        self.noisy, self.number = self.sampling.noise_scaling(self.sigmas[:1], noise_like(clean, [seed]), clean), 0

    def _state(self, negative=False):
        return State(self.noisy, self.sigmas[self.number : self.number + 1], None, self.samplings, negative)


def check_sigmas(sigmas, has_videos):
    """Raises ValueError with one sentence unless these are noise levels that OwnSteps can take.

    has_videos: whether there are videos to begin with.
    """
    if not isinstance(sigmas, torch.Tensor) or sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError("SLA2 Train LoRA: sigmas must be a list of two noise levels or more.")
    if not fall(sigmas) or sigmas[0] > 1.0001:
        raise ValueError(
            f"SLA2 Train LoRA: sigmas must fall from step to step, from 1 or less to 0 or more, and they are {listed(sigmas)}."
        )
    if sigmas[0] < ALL_NOISE and not has_videos:
        raise ValueError(
            f"SLA2 Train LoRA: sigmas begin at {float(sigmas[0]):.3g}, where another model ends: connect latents, videos that "
            "both models made together."
        )


def fall(sigmas):
    """Whether these (n + 1,) noise levels are numbers that fall from step to step, to 0 or more."""
    return bool(torch.isfinite(sigmas).all() and (sigmas.diff() < 0).all() and sigmas[-1] >= 0)


def listed(sigmas):
    """The first of these noise levels, for a sentence."""
    shown = ", ".join(f"{float(sigma):.4g}" for sigma in sigmas[:6])
    return shown if len(sigmas) <= 6 else f"{shown}, ..."
