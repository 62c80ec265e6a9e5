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
from ...sla2_training.losses import DENSE_FROM
from .router_training import training_mode
from .training_states import NoisedVideos, OwnSteps

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
    sigmas: (n + 1,), of the model's own sampling, which training then follows (OwnSteps) with guidance cfg; None: videos with noise.
    """

    steps: int
    batch: int
    learning_rate: float
    optimiser: str
    seed: int
    loss: str
    drop_caption: float
    shift: float = 1.0
    sigmas: torch.Tensor | None = None
    cfg: float = 1.0


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
    """attention: LoraAttention. adapters: LoraAdapters. videos: latents (N, C, ...) as a VAE makes them; zeros: none.

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
        clean = self.videos.to(noise.device, torch.float32)
        if bool(clean.any()):  # zeros are no video: they stay, as in core's sampling
            clean = self.model.process_latent_in(clean)
        parts = self.model.model_sampling, clean, self.settings
        if self.settings.sigmas is None:
            self.states = NoisedVideos(*parts)
        else:
            self.states = OwnSteps(*parts, self.settings.sigmas, self.settings.cfg, self._velocity)
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
            self._estimate_ratios()
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

    @torch.no_grad()
    def _estimate_ratios(self):
        for state in self.states.first():
            own = self._velocity(state)
            if bool(own.isnan().any()):
                raise TrainingError(OWN_NAN)  # no ratio can start at an estimate of it
            self.states.follow(state, own)

    def _loss_and_gradients(self, step):
        """The step's loss; its gradients stay in the parameters."""
        total = 0.0
        for state in self.states.of(step):
            target = self._target(state)
            with training_mode(), torch.enable_grad():
                own = self._velocity(state)
                loss = (own - target).square().mean() / self.settings.batch
                backward(loss, self.model.diffusion_model)
            total += float(loss.detach())
            self.states.follow(state, own)
            self.advance()
        return total

    def _target(self, state):
        """The velocity to come near to: a negative prompt, which describes no video, has the dense model's at any noise level."""
        follows = state.truth is None or state.negative or float(state.sigma) >= DENSE_FROM[self.settings.loss]
        return self._velocity(state, dense=True) if follows else state.truth

    def _velocity(self, state, dense=False):
        """The model's velocity (float32), which denoised = noisy - sigma * velocity holds. dense: as the model was."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.attention.dense = dense
        self.adapters.switch(not dense)
        conds = self.conds["negative" if state.negative else "positive"]
        cond = conds[state.prompt % len(conds)]
        with torch.no_grad() if dense else contextlib.nullcontext():
            (denoised,) = comfy.samplers.calc_cond_batch(self.model, [[cond]], state.noisy, state.sigma, self.options)
        return (state.noisy - denoised).float() / state.sigma

    @torch.no_grad()
    def _measured(self):
        """|own - target| / |target| over the velocities of states that no step has."""
        gap, energy = 0.0, 0.0
        for state in self.states.held_out():
            target, own = self._target(state), self._velocity(state)
            gap, energy = gap + float((own - target).square().sum()), energy + float(target.square().sum())
            self.states.follow(state, own)
        return (gap / energy) ** 0.5 if energy else float("nan")
