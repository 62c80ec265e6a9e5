"""One LoRA training from the copied model to its outputs. Needs ComfyUI 0.25 or newer."""

import gc
from dataclasses import dataclass

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_train import TrainGuider

from ...sla2_kernels import identity_router
from ...sla2_kernels.router_format import printable
from ...sla2_training.ratios import with_trained_ratios
from ..attention.hook import KEY
from ..attention.weight_checks import check_router
from ..compat.sampling import latent_for, sample_once
from ..settings.values import skips_keeps
from .lora_adapters import LoraAdapters
from .lora_attention import LoraAttention
from .lora_copy import training_copy
from .lora_training import LoraSettings, LoraTraining

# loss -> whose velocity the error is against
TARGETS = {
    "distill": "the dense model's",
    "flow": "the true one",
    "mixed": "the true one at low noise, the dense model's at high noise",
}


@dataclass(frozen=True)
class LoraPlan:
    """sparsity, precision: of the attention. rank: of the LoRA. settings: of the optimisation."""

    sparsity: float
    precision: str
    rank: int
    settings: LoraSettings


def check_makes_no_sound(model, latents):
    """Raises ValueError where the model samples sound along with videos of these latents."""
    empty = latents if latents.is_nested else torch.zeros_like(latents)  # to which ComfyUI adds what the model makes
    if latent_for(model, {"samples": empty}).is_nested:
        raise ValueError("SLA2 Train LoRA: models that make sound along with the video cannot be trained yet.")


def check_prompts(**prompts):
    """Raises ValueError where a prompt is for a part of the sampling only: a training draws any noise level for each of them.

    At the others ComfyUI would not call the model at all. prompts: CONDITIONING by the name of its input.
    """
    for name, conditioning in prompts.items():
        for _, options in conditioning:
            if options.get("start_percent", 0.0) > 0 or options.get("end_percent", 1.0) < 1:
                raise ValueError(
                    f"SLA2 Train LoRA: {name} holds a prompt for a part of the sampling (ConditioningSetTimestepRange), and "
                    "a training needs prompts for all of it: connect them without that node."
                )


class LoraSession:
    """model: a ComfyUI ModelPatcher of a known family, left as it is. facts: its ModelFacts. router: RouterWeights or None.

    say(headline, losses): progress. advance(): after each sampling step and each video of a training step.
    Raises ValueError, RouterFileError with one sentence where something does not fit.
    """

    def __init__(self, model, facts, router, plan, say, advance):
        self.family, self.plan, self._say, self._advance = facts.layout.family, plan, say, advance
        sizes = (self.family, facts.num_layers, facts.num_heads, facts.head_dim)
        self.start_router = identity_router(*sizes) if router is None else router
        check_router(self.start_router, facts)
        self.attention = LoraAttention(self.start_router, plan.sparsity, plan.precision, model.load_device)
        self.model = self.attention.install(training_copy(model), facts.num_layers)
        # a training is not a sampling run to report
        self.model.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
        blocks = dict.fromkeys(".".join(path.split(".")[:2]) for path in facts.attention_paths)
        self.adapters = LoraAdapters(self.model.model, list(blocks), plan.rank, plan.settings.seed % 2**63)
        self.videos = self.training = None

    @property
    def losses(self):
        tuning = self.training and self.training.tuning
        return tuning.losses if tuning else []

    @property
    def done(self):
        """Optimisation steps."""
        return len(self.losses)

    def resume(self, name):
        """Goes on from a file in models/loras."""
        path = folder_paths.get_full_path_or_raise("loras", name)
        try:
            state = comfy.utils.load_torch_file(path, safe_load=True)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # torch and safetensors raise errors of many kinds for a damaged file
            said = printable(str(error).split("\n")[0])
            raise ValueError(
                f"SLA2 Train LoRA cannot go on from {name}: the file cannot be read, it is damaged or no LoRA ({said})."
            ) from error
        self.adapters.load(state, name)

    def take_videos(self, latents, prompts):
        """Trains on latents of the user's, which ``prompts`` many prompts belong to."""
        channels = self.model.model.latent_format.latent_channels
        if latents.ndim != 5 or latents.shape[1] != channels or not latents.numel():
            raise ValueError(
                f"SLA2 Train LoRA: latents must be videos of this model's VAE, (videos, {channels}, frames, height, width), "
                f"and these are {tuple(latents.shape)}."
            )
        if not bool(torch.isfinite(latents).all()):
            raise ValueError("SLA2 Train LoRA: latents hold NaN or infinity; encode the videos again.")
        if prompts not in (1, len(latents)):
            raise ValueError(
                f"SLA2 Train LoRA: {len(latents)} latents need as many prompts or a single one, and positive has {prompts}; "
                "join prompts with Conditioning (Combine)."
            )
        if not bool(latents.any()):
            raise ValueError(
                "SLA2 Train LoRA: latents are an empty latent, which holds no video: connect videos that the model's VAE "
                "encoded, or disconnect latents."
            )
        self.videos = latents.float().clone()

    def take_size(self, latent_image):
        """Trains on no videos: on as large ones as this LATENT says, from noise."""
        self.videos = torch.zeros_like(latent_for(self.model, latent_image)[:1], dtype=torch.float32)

    @torch.no_grad()
    def make_videos(self, count, positive, negative, latent_image, seed, sampler):
        """Trains on ``count`` videos that the dense model makes now. sampler: steps, cfg, names."""
        one = latent_image | {"samples": latent_image["samples"][:1].clone()}
        one.pop("batch_index", None)
        made = []
        for number in range(count):
            self._say(f"making video {number + 1} of {count} with the dense model", [])
            prompt = [positive[number % len(positive)]]
            noise = (seed + number) % 2**64
            made.append(sample_once(self.model, prompt, negative, one, noise, lambda *_: self._advance(), sampler))
            self._forget()
        self.videos = torch.cat(made)

    def train(self, positive, negative):
        """The whole training. Raises TrainingError where it cannot go on; what is done stays in lora() and router()."""

        def say(headline):
            self._say(headline, self.losses)

        parts = self.attention, self.adapters, self.plan.settings, self.videos
        self.training = LoraTraining(*parts, say, self._advance, self._forget)
        guider = TrainGuider(self.model)
        guider.inner_set_conds({"positive": positive, "negative": negative})
        shape = torch.zeros_like(self.videos[:1])
        guider.sample(shape, shape, self.training, torch.tensor([1.0, 0.0]), seed=self.plan.settings.seed)

    def lora(self):
        """LORA_MODEL as it is trained so far."""
        return self.adapters.state()

    def router(self):
        """RouterWeights with the ratios as they are trained so far."""
        return with_trained_ratios(
            self.start_router, self.attention.trained_logits(), self.plan.sparsity, self.plan.precision
        )

    def report(self):
        """What the training brought, as text."""
        before, after = self.training.errors
        moved = [(now - then).abs().max() for now, then in zip(self.ratios(), self.training.start_ratios, strict=True)]
        size = sum(parameter.numel() for parameter in self.adapters.parameters())
        settings = self.plan.settings
        target = TARGETS[settings.loss]
        where = "on new noise" if settings.sigmas is None else "in its own steps from new noise"
        lines = [
            f"velocity error against {target}, {where} ({skips_keeps(self.plan.sparsity)}): {before:.4g} before, {after:.4g} after",
            f"loss: {self.losses[0]:.4g} in the first step, {self.losses[-1]:.4g} in the last of {self.done}",
            f"LoRA: rank {self.plan.rank} in {len(self.adapters.adapters)} layers, {size * 2 / 2**20:.1f} MiB in 16 bit",
            f"mixing ratios moved by up to {max(moved):.3f}",
            f"{self.attention.sparse_calls} attention calls ran sparse",
        ]
        met, steps = settings.steps * settings.batch, 0 if settings.sigmas is None else len(settings.sigmas) - 1
        if met < steps:
            lines.append(
                f"trained in {met} of the {steps} steps of a sampling: more training_steps reach the later ones"
            )
        return "\n".join(lines + [f"{count} ran dense: {why}" for why, count in self.attention.untrained.items()])

    def ratios(self):
        return [torch.sigmoid(logits.detach()) for logits in self.attention.ratio_logits]

    def close(self):
        """Frees the copied model. Its modules are in reference cycles, which only the garbage collector breaks."""
        self.model = self.attention = self.adapters = self.training = None
        gc.collect()
        comfy.model_management.soft_empty_cache()

    def _forget(self):
        self.model.get_attachment(KEY).runs.forget()
