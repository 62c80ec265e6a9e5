"""SLA2 Train LoRA: stage 2 on the model in the graph. The model adapts to sparse attention, and the ratios to the LoRA."""

import inspect
import logging

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io, ui

from ..sla2_kernels.support import resolve_precision
from ..sla2_training import TrainingError
from ..sla2_training.optimisers import missing_optimiser
from .attention.failures import is_out_of_memory
from .attention.layer_requests import trained_for_vsa_reason
from .attention.model_families import facts_of, unsupported_reason_of
from .compat.needed_version import needs_comfyui
from .load_router import Router
from .page.events import send_event
from .page.text import plain, show_on_node
from .settings.values import PRECISIONS
from .training.lora_files import save_both
from .training.loss_curves import loss_curves
from .training.loss_plot import plot_losses
from .training.training_states import check_sigmas, fall, listed

logger = logging.getLogger("sla2")

DISTILL, FLOW, MIXED = "match the dense model", "flow matching on latents", "both, by noise level"
STEPS = "match the dense model step by step"
# option -> (loss of losses.py, what its curve shows)
LOSSES = {
    DISTILL: ("distill", "distance to the dense model's velocity"),
    FLOW: ("flow", "flow-matching loss"),
    MIXED: ("mixed", "distance to the true velocity at low noise, to the dense model's at high noise"),
    STEPS: ("distill", "distance to the dense model's velocity"),
}
NEW = "none (new LoRA)"
NOT_CONNECTED = "not connected"
OPTIMIZERS = {"AdamW": "adamw", "Muon": "muon"}  # spelled as core's Train LoRA does
# guidance weighs the prompt's and the negative prompt's velocity about equally
NEGATIVE_SHARE = 0.5
OUT_OF_MEMORY = (
    "SLA2 Train LoRA ran out of memory at step {}: a shorter or smaller latent_image (or latents), fp8 as weight_dtype in "
    "Load Diffusion Model, or a lower rank needs less."
)


class SLA2TrainLora(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        as_sampler = "As in the sampler node."
        return io.Schema(
            node_id="SLA2TrainLora",
            display_name="SLA2 Train LoRA",
            category="model/sla2",
            description="Trains a LoRA that lets the model keep its quality at a higher sparsity, together with the router's "
            "mixing ratios. Needs no videos: it learns from the same model run dense. Cancelling saves what has been "
            "trained so far to models/loras and models/sla2.",
            hidden=[io.Hidden.unique_id],
            search_aliases=["train LoRA", "fine-tune sparse attention", "SLA2 stage 2", "QAT", "distillation"],
            # saved workflows store widget values by position: new inputs go to the end
            inputs=[
                io.Model.Input("model", tooltip="The model as loaded, with the LoRAs it will always be used with. It is not changed: a copy is trained."),
                io.Conditioning.Input("positive", tooltip="A prompt like those you will use; with several joined by Conditioning (Combine), each video uses the next one."),
                io.Conditioning.Input("negative", tooltip="The negative prompt that will be used. Only matters if cfg is above 1."),
                io.Latent.Input("latent_image", tooltip="The size to train at; it determines time and memory. Not used if latents are connected."),
                Router.Input("router", optional=True, tooltip="From SLA2 Train Router or SLA2 Load Router, for this model. Not connected: untrained, which needs more steps."),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
                    tooltip="Seed of the first video, the LoRA's initial values and the training.",
                ),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip=f"{as_sampler} For the videos that the dense model generates first, or to train step by step."),
                io.Float.Input(
                    "cfg", default=6.0, min=0.0, max=100.0, step=0.1, round=0.01,
                    tooltip="As in the sampler node: 1 for distilled models, about 6 for others.",
                ),
                io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS, default="uni_pc", tooltip=as_sampler),
                io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS, default="simple", tooltip=as_sampler),
                io.Float.Input(
                    "sparsity", default=0.97, min=0.1, max=0.99, step=0.01, round=0.01,
                    tooltip="The sparsity that LoRA and ratios are trained for: 0.97 skips 97%, keeps 3%. Use them at this sparsity.",
                ),
                io.Combo.Input(
                    "bit_width", options=list(PRECISIONS), default="auto",
                    tooltip="Precision inside the attention, as in SLA2 Apply Attention. Gradients are computed in 16 bit.",
                ),
                io.Combo.Input(
                    "loss", options=list(LOSSES), default=DISTILL,
                    tooltip=f"{DISTILL}: the distance to the output of the same model run dense, on its own videos or on your "
                    f"latents. {FLOW}: as the model itself was trained, on your own videos. {MIXED}: your videos at low noise, "
                    "the dense model at high noise. Less loss than the first, with videos as close to the dense model's. "
                    f"{STEPS}: in the steps of its own sampling from pure noise; makes no videos first. For a longer training of a model that "
                    "samples in few steps, after the first.",
                ),
                io.Int.Input(
                    "videos", default=4, min=1, max=1000,
                    tooltip="Training videos that the dense model generates first. Not used if latents are connected, or to train step by step.",
                ),
                io.Int.Input("rank", default=16, min=1, max=256, tooltip="Rank of the LoRA: its size, and how much it can learn."),
                io.Int.Input("training_steps", default=100, min=1, max=100_000, tooltip="Optimisation steps. 20 for a trial, 100 to 500 for use."),
                io.Int.Input(
                    "batch_size", default=4, min=1, max=1024,
                    tooltip="Videos per optimisation step, processed one by one: more is steadier and slower, but needs no more memory.",
                ),
                io.Float.Input(
                    "learning_rate", default=0.0005, min=1e-7, max=1.0, step=1e-7, round=1e-7,
                    tooltip="Learning rate of the LoRA, as in core's Train LoRA. Lower it if the loss jumps.",
                ),
                io.Latent.Input("latents", optional=True, tooltip="Your own videos, encoded by the model's VAE, one batch of one size."),
                io.Combo.Input(
                    "resume_lora", optional=True, options=[NEW, *folder_paths.get_filename_list("loras")], default=NEW,
                    tooltip="A LoRA made by this node, to continue training. Connect the matching router.", advanced=True,
                ),
                io.Combo.Input(
                    "optimizer", optional=True, options=list(OPTIMIZERS), default="AdamW", advanced=True,
                    tooltip="Muon (PyTorch 2.9 or newer) learns more per step from your own videos, with learning_rate 2 to 4 times as high.",
                ),
                io.Sigmas.Input(
                    "sigmas", optional=True,
                    tooltip=f"Only for {STEPS}: the noise levels of your sampling, such as one half of Split Sigmas for a model of Wan 2.2. "
                    "Not connected: those of steps and scheduler.",
                ),
            ],
            outputs=[
                io.Custom("LORA_MODEL").Output(display_name="lora", tooltip="For Load LoRA Model, and Save LoRA Weights."),
                Router.Output(display_name="router", tooltip="The router with the ratios for this LoRA. Its projections are unchanged."),
                io.String.Output(display_name="report", tooltip="Error before and after, and what was trained."),
                io.Int.Output(display_name="steps", tooltip="Number of optimisation steps, for the file name in Save LoRA Weights."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, model, optimizer="AdamW", loss=None, latents=NOT_CONNECTED, sigmas=NOT_CONNECTED):
        """Refuses the prompt on an older ComfyUI or PyTorch, or with other inputs than its loss takes, before anything of it
        runs. model: without an input that is always there ComfyUI may not call this. The others: None where a link brings them.
        """
        if "force_deepcopy" not in inspect.signature(comfy.model_patcher.ModelPatcher.clone).parameters:
            raise needs_comfyui("SLA2 Train LoRA", "0.25", "whose LoRA training it builds on")
        # ComfyUI leaves the check of an input that is named here to this function
        if loss is not None:
            check_loss(loss, latents is not NOT_CONNECTED, sigmas is not NOT_CONNECTED)
        if optimizer is not None and optimizer not in OPTIMIZERS:
            return f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}."
        reason = missing_optimiser(OPTIMIZERS.get(optimizer))
        return f"optimizer: {reason}. Choose AdamW, or update PyTorch." if reason else True

    @classmethod
    def execute(
        cls, model, positive, negative, latent_image, seed, steps, cfg, sampler_name, scheduler, sparsity, bit_width, loss,
        videos, rank, training_steps, batch_size, learning_rate, router=None, latents=None, resume_lora=NEW, optimizer="AdamW",
        sigmas=None,
    ) -> io.NodeOutput:  # fmt: skip
        from .training.lora_session import LoraPlan, LoraSession, check_makes_no_sound, check_prompts
        from .training.lora_training import LoraSettings

        facts = facts_of(model)
        reason = unsupported_reason_of(model) or trained_for_vsa_reason(model, facts)
        if reason is not None:
            raise ValueError(f"SLA2 Train LoRA: {reason}.")
        check_loss(loss, latents is not None, sigmas is not None)
        check_prompts(positive=positive, **({"negative": negative} if cfg > 1 and loss != FLOW else {}))
        check_makes_no_sound(model, (latent_image if latents is None else latents)["samples"])
        kind, measure = LOSSES[loss]
        sampler = {"steps": steps, "cfg": cfg, "sampler_name": sampler_name, "scheduler": scheduler}
        if sigmas is not None:
            check_sigmas(sigmas, has_videos=latents is not None)
        elif loss == STEPS:
            sigmas = sigmas_of(model, sampler)
        makes_videos = latents is None and loss != STEPS
        plan = LoraPlan(
            sparsity=sparsity,
            precision=resolve_precision(bit_width, model.load_device),
            rank=rank,
            settings=LoraSettings(
                steps=training_steps,
                batch=batch_size,
                learning_rate=learning_rate,
                optimiser=OPTIMIZERS[optimizer],
                seed=seed,
                loss=kind,
                drop_caption=NEGATIVE_SHARE if loss != FLOW and cfg > 1 else 0.0,
                sigmas=sigmas,
                cfg=max(cfg, 1.0),
            ),
        )
        node = cls.hidden.unique_id
        bar = comfy.utils.ProgressBar(training_steps * batch_size + (videos * steps if makes_videos else 0))

        def say(headline, losses):
            send_event("training", node, {"headline": headline, "curves": loss_curves({0: losses}), "caption": measure})

        # nodes run in inference mode, whose tensors no backward pass may keep
        with torch.inference_mode(False):
            session = LoraSession(model, facts, router, plan, say, lambda: bar.update(1))
            try:
                if resume_lora != NEW:
                    session.resume(resume_lora)
                if makes_videos:
                    session.make_videos(videos, positive, negative, latent_image, seed, sampler)
                elif latents is None:
                    session.take_size(latent_image)
                else:
                    session.take_videos(latents["samples"], len(positive))
                session.train(positive, negative)
                lora, trained, losses = session.lora(), session.router(), session.losses
                text = plain(session.report())
            except comfy.model_management.InterruptProcessingException:
                keep_trained(session, node, "cancelled")
                raise
            except TrainingError as error:
                raise TrainingError(f"{error}{keep_trained(session, node, 'stopped')}") from error
            except Exception as error:  # another pack's, too: an hour's work is not lost with it
                sentence = keep_trained(session, node, "stopped")
                if is_out_of_memory(error):
                    raise TrainingError(f"{OUT_OF_MEMORY.format(session.done)}{sentence}") from error
                raise
            finally:
                session.close()
        show_on_node(node, text)
        images = ui.PreviewImage(plot_losses({"loss": losses}, f"SLA2 LoRA training: {measure}"), cls=cls).as_dict()
        return io.NodeOutput(lora, trained, text, len(losses), ui={**images, "text": (text,)})


def check_loss(loss, has_latents, has_sigmas):
    """Raises ValueError with one sentence unless it is one of LOSSES, with the videos that it needs and no unused sigmas."""
    if loss not in LOSSES:
        raise ValueError(f"SLA2 Train LoRA: loss must be one of {', '.join(LOSSES)}, got {loss!r}.")
    if loss in (FLOW, MIXED) and not has_latents:
        raise ValueError(f'SLA2 Train LoRA: "{loss}" needs videos of yours: connect latents, or choose "{DISTILL}".')
    if has_sigmas and loss != STEPS:
        raise ValueError(f'SLA2 Train LoRA: sigmas are only for "{STEPS}": choose it as loss, or disconnect sigmas.')


def sigmas_of(model, sampler):
    """(n + 1,) noise levels that KSampler takes with these steps, sampler_name and scheduler.

    Raises ValueError with one sentence where some are repeated or no numbers.
    """
    steps, scheduler = sampler["steps"], sampler["scheduler"]
    names = {"sampler": sampler["sampler_name"], "scheduler": scheduler}
    sigmas = comfy.samplers.KSampler(
        model, steps, model.load_device, **names, denoise=1.0, model_options=model.model_options
    ).sigmas.cpu()
    if not fall(sigmas):
        raise ValueError(
            f"SLA2 Train LoRA: with steps {steps}, scheduler {scheduler} makes noise levels that do not fall from step to step, "
            f"{listed(sigmas)}: choose another scheduler or other steps."
        )
    return sigmas


def keep_trained(session, node, what):
    """Saves what an ended training reached, LoRA and router; a sentence for the user, or ""."""
    if not session.done:
        return ""
    saved = save_both(session.lora, session.router, session.family)
    sentence = f"{session.done} optimisation steps are done. {saved}"
    logger.info("SLA2 LoRA training %s. %s", what, sentence)
    show_on_node(node, f"{what}. {sentence}")
    return f" {sentence}"
