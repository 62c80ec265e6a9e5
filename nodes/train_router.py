"""SLA2 Train Router: stage 1 on the model in the graph, while it samples densely."""

import logging

import comfy.model_management
import comfy.samplers
import comfy.utils
from comfy_api.latest import io, ui

from ..sla2_training import TrainerOptions, TrainingError
from .attention.layer_requests import trained_for_vsa_reason
from .attention.model_families import facts_of, unsupported_reason_of
from .compat.needed_version import needs_comfyui
from .compat.sampling import sample_once
from .load_router import Router
from .page.events import send_event
from .page.text import plain, show_on_node
from .training.loss_curves import loss_curves
from .training.loss_plot import plot_losses
from .training.router_files import save_trained
from .training.router_training import RouterTraining, Schedule, make_trainer, parse_sparsities
from .training.suggested_schedule import suggested_schedule

logger = logging.getLogger("sla2")
CAPTION = "mean loss; band: best and worst layer (share of the output's energy)"


class SLA2TrainRouter(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SLA2TrainRouter",
            display_name="SLA2 Train Router",
            category="model/sla2",
            description="Trains a router for exactly this model: samples with the dense model and learns, in every attention "
            "layer, which key blocks to keep and how to mix. One additional sampling measures the result. "
            "Cancelling saves what has been trained so far to models/sla2.",
            hidden=[io.Hidden.unique_id],
            search_aliases=["train sparse attention", "fine-tune router", "SLA2 training", "calibrate"],
            # saved workflows store widget values by position: new inputs go to the end
            inputs=[
                io.Model.Input("model", tooltip="The model, with the LoRAs it will be used with, before SLA2 Apply Attention."),
                io.Conditioning.Input("positive", tooltip="A prompt like those the router will be used for."),
                io.Conditioning.Input("negative", tooltip="The negative prompt that will be used. Only matters if cfg is above 1."),
                io.Latent.Input("latent_image", tooltip="Training uses its size; the router also works at larger sizes."),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
                    tooltip="Seed of the first sampling and of the training; each further sampling uses the next seed.",
                ),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Sampling steps, as in the sampler node."),
                io.Float.Input(
                    "cfg", default=6.0, min=0.0, max=100.0, step=0.1, round=0.01,
                    tooltip="As in the sampler node: 1 for distilled models, about 6 for others.",
                ),
                io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS, default="uni_pc", tooltip="As in the sampler node."),
                io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS, default="simple", tooltip="As in the sampler node."),
                io.String.Input(
                    "sparsities", default="0.97, 0.95, 0.90",
                    tooltip="Sparsities to train for: 0.97 skips 97%, keeps 3%. Ratios in between are interpolated.",
                ),
                io.Int.Input(
                    "training_steps", default=120, min=1, max=100_000,
                    tooltip="Optimisation steps per layer. At most 4 fit into one sampling step, so 120 take two "
                    "samplings of 20 steps, and one more to measure.",
                ),
                Router.Input("resume", optional=True, tooltip="A router of this model to continue training."),
                io.Float.Input(
                    "learning_rate", default=TrainerOptions.learning_rate, min=1e-6, max=1.0, step=1e-6, round=1e-6,
                    tooltip="Learning rate of the router's projections (Adam).", advanced=True,
                ),
                io.Int.Input(
                    "query_blocks", default=TrainerOptions.query_blocks, min=1, max=1024,
                    tooltip="Query blocks of 128 tokens drawn per head and step. Halved automatically if memory runs out.",
                    advanced=True,
                ),
            ],
            outputs=[
                Router.Output(display_name="router", tooltip="The trained router, usable at once."),
                io.String.Output(display_name="report", tooltip="Errors per layer and sparsity, before and after."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, sparsities=None):
        """Refuses the prompt before anything of it runs. sparsities: None where a wire brings them."""
        if not hasattr(comfy.model_management, "in_training"):
            raise needs_comfyui("SLA2 Train Router", "0.14", "which can be told that gradients are on")
        if sparsities is not None:
            parse_sparsities(sparsities)
        return True

    @classmethod
    def execute(
        cls, model, positive, negative, latent_image, seed, steps, cfg, sampler_name, scheduler, sparsities,
        training_steps, learning_rate, query_blocks, resume=None,
    ) -> io.NodeOutput:  # fmt: skip
        facts = facts_of(model)
        reason = unsupported_reason_of(model) or trained_for_vsa_reason(model, facts)
        if reason is not None:
            raise ValueError(f"SLA2 Train Router: {reason}.")
        options = TrainerOptions(learning_rate=learning_rate, query_blocks=query_blocks, seed=seed % 2**63)
        trainer = make_trainer(facts, parse_sparsities(sparsities), options, resume)
        node = cls.hidden.unique_id
        schedule = Schedule(training_steps, steps)

        def show(headline, **more):
            shown = {"headline": headline, "curves": loss_curves(trainer.losses), "caption": CAPTION}
            send_event("training", node, shown | more)

        def show_progress(text):
            show(text.split("\n")[0])

        def show_end(suggested):
            suggestion = {"schedule": suggested, "layers": facts.num_layers}
            show(f"trained: {training.steps_done} optimisation steps", suggestion=suggestion)

        training = RouterTraining(model, facts, trainer, schedule, show_progress)
        sampler = {"steps": steps, "cfg": cfg, "sampler_name": sampler_name, "scheduler": scheduler}
        bar = comfy.utils.ProgressBar((schedule.passes + 1) * steps)

        def sample(number, callback):
            sample_once(training.model, positive, negative, latent_image, (seed + number) % 2**64, callback, sampler)

        try:
            training.run(sample, lambda: bar.update(1))
        except comfy.model_management.InterruptProcessingException:
            keep_trained(training, facts, node, "cancelled")
            raise
        except TrainingError as error:
            raise TrainingError(f"{error}{keep_trained(training, facts, node, 'stopped')}") from error
        except Exception:  # out of memory in the sampler, another pack's error: an hour's work is not lost with it
            keep_trained(training, facts, node, "stopped")
            raise
        suggested = suggested_schedule(trainer.report())
        show_end(suggested)
        text = plain(f"{training.report()}\nSuggested schedule: {suggested or 'none, no layer was measured'}")
        show_on_node(node, text)
        images = ui.PreviewImage(plot_losses(trainer.losses), cls=cls).as_dict()
        return io.NodeOutput(trainer.router(), text, ui={**images, "text": (text,)})


def keep_trained(training, facts, node, what):
    """Saves what an ended training reached as models/sla2/<family>_autosave_<number>_; a sentence for the user, or ""."""
    if not training.steps_done:
        return ""
    sentence, advice = save_trained(training.trainer.router, f"{facts.layout.family}_autosave", training.steps_done)
    logger.info("SLA2 router training %s. %s", what, sentence)
    show_on_node(node, f"{what}. {sentence} {advice}".strip())
    return f" {sentence}"
