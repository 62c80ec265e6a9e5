"""Trains a LoRA and the mixing ratios of a model run through SLA2: the loop that core's training guider runs as a sampler.

Needs ComfyUI 0.25 or newer.
"""

import contextlib
from dataclasses import dataclass

import comfy.model_management
import comfy.samplers
import torch
from comfy_extras.nodes_train import find_modules_at_depth, patch, process_cond_list, unpatch

from ...sla2_kernels.support import on_device
from ...sla2_training import FineTuning, TrainingError
from ...sla2_training.draws import drawn, noise_like
from ...sla2_training.losses import DENSE_FROM
from .router_training import training_mode

LEVELS = 4  # noise levels that the error is measured at
HELD_OUT = 2**62  # seeds from here on are never drawn
BLOCK_DEPTH = 2  # of a model's blocks, as core's training node counts
OWN_NAN = (
    "SLA2 Train LoRA: the model's own output holds NaN before anything is trained; try another precision for the model."
)
# what PyTorch says of a model that was written for inference alone
NO_GRADIENTS = ("modified by an inplace operation", "torch.utils.checkpoint:", "no autograd formula was registered")


@dataclass(frozen=True)
class LoraSettings:
    """steps, batch: optimisation steps, videos per step. learning_rate, optimiser: of the LoRA. seed: of what is drawn.

    loss: "distill", the distance to the dense model's velocity, "flow", that to the true one, or "mixed", by noise level (losses.py).
    drop_caption: share of videos trained with the negative prompt. shift: 1, for levels come from the model's own schedule.
    """

    steps: int
    batch: int
    learning_rate: float
    optimiser: str
    seed: int
    loss: str
    drop_caption: float
    shift: float = 1.0


def backward(loss, model):
    """loss.backward(); raises ValueError with one sentence where ``model``, which made it, has no gradients."""
    try:
        loss.backward()
    except RuntimeError as error:
        if not any(words in str(error) for words in NO_GRADIENTS):
            raise
        raise ValueError(
            f"SLA2 Train LoRA: ComfyUI's {type(model).__name__} cannot be trained: it overwrites tensors that gradients "
            f"are computed from, or uses operations without gradients ({str(error).splitlines()[0]})."
        ) from error


class LoraTraining(comfy.samplers.Sampler):
    """attention: LoraAttention. adapters: LoraAdapters. videos: latents (N, C, ...) as a VAE makes them.

    say(text), advance(), forget(): called after each step, after each of its videos, before each step.
    tuning: FineTuning once it has begun. errors: relative error of the velocity that is
    trained towards, before and after.
    start_ratios: (H, A) per layer.
    """

    def __init__(self, attention, adapters, settings, videos, say, advance, forget):
        self.attention, self.adapters, self.settings, self.videos = attention, adapters, settings, videos
        self.say, self.advance, self.forget = say, advance, forget
        self.tuning, self.errors, self.start_ratios = None, [], None

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        """What core's guider calls with the model loaded: the whole training."""
        self.model, self.options = model_wrap.inner_model, extra_args["model_options"]
        self.conds = process_cond_list(model_wrap.conds)
        self.clean = self.model.process_latent_in(self.videos.to(noise.device, torch.float32))
        # unlike its sampling guider, core's training guider does not set the current device
        with on_device(noise.device), self._prepared(model_wrap.model_patcher):
            self._train()
        return torch.zeros_like(noise)

    @contextlib.contextmanager
    def _prepared(self, patcher):
        """LoRA in the layers, and every block recomputed in the backward pass instead of kept."""
        injections = self.adapters.injections(patcher.model)
        blocks = find_modules_at_depth(patcher.model.diffusion_model, depth=BLOCK_DEPTH)
        try:
            for injection in injections:
                injection.inject(patcher)
            for block in blocks:
                patch(block)
            yield
        finally:
            for block in blocks:
                unpatch(block)
            for injection in injections:
                injection.eject(patcher)

    def _train(self):
        settings, attention = self.settings, self.attention
        self.say("measuring")
        if attention.needs_start:
            with torch.no_grad():
                first = self._velocity(*self._noisy(0, 0.5, HELD_OUT)[:2], self.conds["positive"][0])
            if bool(first.isnan().any()):
                raise TrainingError(OWN_NAN)  # no ratio can start at an estimate of it
            attention.start_ratios()
        self.start_ratios = [torch.sigmoid(logits.detach()) for logits in attention.ratio_logits]
        error = self._measured()
        if not attention.sparse_calls:
            reason = next(iter(attention.untrained), "another node replaced the model's self-attention")
            raise ValueError(f"SLA2 Train LoRA: nothing could be trained: {reason}.")
        if error != error:
            raise TrainingError(OWN_NAN)
        self.errors.append(error)
        self.tuning = FineTuning(
            self.adapters.parameters(),
            attention.ratio_logits,
            steps=settings.steps,
            learning_rate=settings.learning_rate,
            optimiser=settings.optimiser,
        )
        for step in range(settings.steps):
            self.forget()
            self.tuning.update(self._loss_and_gradients(step))
            self.say(f"step {step + 1} of {settings.steps}: loss {self.tuning.losses[-1]:.4g}")
        self.say("measuring")
        error = self._measured()
        self.tuning.require_finite(error, "last measured error")
        self.errors.append(error)

    def _loss_and_gradients(self, step):
        """The step's loss; its gradients stay in the parameters."""
        settings, total = self.settings, 0.0
        for index, level, dropped, seed in zip(*drawn(settings, step, len(self.clean)), strict=True):
            noisy, sigma, truth = self._noisy(int(index), float(level), int(seed))
            conds = self.conds["negative" if dropped else "positive"]
            cond = conds[int(index) % len(conds)]
            # a negative prompt is no description of the video
            target = self._target(noisy, sigma, cond, truth, dropped)
            with training_mode(), torch.enable_grad():
                loss = (self._velocity(noisy, sigma, cond) - target).square().mean() / settings.batch
                backward(loss, self.model.diffusion_model)
            total += float(loss)
            self.advance()
        return total

    def _noisy(self, index, level, seed):
        """(noisy, sigma, velocity) of one video; level: share of the way from no noise to all of it, before any shift."""
        clean = self.clean[index : index + 1]
        noise = noise_like(clean, [seed])
        sampling = self.model.model_sampling
        sigma = torch.tensor([float(sampling.percent_to_sigma(1 - level))], device=clean.device)
        noisy = sampling.noise_scaling(sigma, noise, clean)
        # at sigma 1 only (scaled) noise is left
        all_noise = sampling.noise_scaling(torch.ones_like(sigma), noise, clean)
        return noisy, sigma, all_noise - clean

    def _target(self, noisy, sigma, cond, truth, dense=False):
        """The velocity to come near to. dense: the dense model's at any noise level."""
        dense = dense or float(sigma) >= DENSE_FROM[self.settings.loss]
        return self._velocity(noisy, sigma, cond, dense=True) if dense else truth

    def _velocity(self, noisy, sigma, cond, dense=False):
        """The model's velocity (float32), which denoised = noisy - sigma * velocity holds. dense: as the model was."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.attention.dense = dense
        self.adapters.switch(not dense)
        with torch.no_grad() if dense else contextlib.nullcontext():
            (denoised,) = comfy.samplers.calc_cond_batch(self.model, [[cond]], noisy, sigma, self.options)
        return (noisy - denoised).float() / sigma

    @torch.no_grad()
    def _measured(self):
        """|own - target| / |target| over the velocities at a few levels, on noise that no step has."""
        gap, energy, cond = 0.0, 0.0, self.conds["positive"][0]
        for number in range(LEVELS):
            noisy, sigma, truth = self._noisy(0, (number + 0.5) / LEVELS, HELD_OUT + number)
            target = self._target(noisy, sigma, cond, truth)
            own = self._velocity(noisy, sigma, cond)
            gap, energy = gap + float((own - target).square().sum()), energy + float(target.square().sum())
        return (gap / energy) ** 0.5 if energy else float("nan")
