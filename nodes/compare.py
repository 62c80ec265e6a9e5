"""SLA2 Compare: is SLA2 worth it here? The same noise, dense and with SLA2, on the graph's own model, size and card."""

import logging

import comfy.model_management
import comfy.samplers
import comfy.utils
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy_api.latest import io

from ..sla2_kernels import default_precision
from .attention.hook import KEY
from .attention.model_families import unsupported_reason_of
from .attention.patching import install
from .comparison.break_even import attend_as, break_even, time_lengths
from .comparison.frames import check_vae, saved_frames
from .comparison.rival import against_rival
from .comparison.runs import Measured, StepClock, attention_seconds, comparison_data, comparison_text, line_to_paste
from .compat.rival_attention import rivals_node
from .compat.sampling import latent_for, sample_once
from .page.text import plain, show_on_node
from .runs.report_text import error_in_words, report_data
from .runs.to_paste import versions
from .settings.values import AttentionSettings, skips_keeps

logger = logging.getLogger("sla2")


class SLA2Compare(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        as_sampler = "As in the sampler node."
        return io.Schema(
            node_id="SLA2Compare",
            display_name="SLA2 Compare",
            category="model/sla2",
            description="Samples twice with the same noise, dense and with SLA2, and measures both: time per step, attention's "
            "share of it, the maximum possible speed-up, the latent error, peak memory, and the number of tokens from which SLA2 "
            "is faster on this card.",
            is_output_node=True,
            search_aliases=["SLA2 benchmark", "speed test", "break-even", "A/B test", "is it faster", "minimum tokens"],
            hidden=[io.Hidden.unique_id],
            # saved workflows store widget values by position: new inputs go to the end
            inputs=[
                io.Model.Input("model", tooltip="From SLA2 Apply Attention, whose settings are measured."),
                io.Conditioning.Input("positive", tooltip=as_sampler),
                io.Conditioning.Input("negative", tooltip=as_sampler),
                io.Latent.Input(
                    "latent_image", tooltip="The size to measure at: the longer and larger the video, the more SLA2 saves."
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
                    tooltip="Both samplings start from the same noise.",
                ),
                io.Int.Input(
                    "steps", default=8, min=2, max=10000,
                    tooltip="Steps of each sampling. The first one warms up and is left out of the median.",
                ),
                io.Float.Input("cfg", default=6.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip=as_sampler),
                io.Combo.Input(
                    "sampler_name", options=comfy.samplers.KSampler.SAMPLERS, default="uni_pc", tooltip=as_sampler
                ),
                io.Combo.Input(
                    "scheduler", options=comfy.samplers.KSampler.SCHEDULERS, default="simple", tooltip=as_sampler
                ),
                io.Boolean.Input(
                    "find_break_even", default=True,
                    tooltip="Also times both attentions at growing lengths (about 20 s) to find the number of tokens from which "
                    "SLA2 is faster on this card.",
                ),
                io.Vae.Input(
                    "vae", optional=True,
                    tooltip="Shows frames of both videos on the node, with a slider between them. Not connected: numbers only.",
                ),
            ],
            outputs=[
                io.Latent.Output("dense", display_name="dense", tooltip="The latent sampled with dense attention."),
                io.Latent.Output("sla2", display_name="sla2", tooltip="The latent sampled with SLA2."),
                io.String.Output("report", display_name="report", tooltip="The measured numbers as text."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, positive, negative, latent_image, seed, steps, cfg, sampler_name, scheduler, find_break_even,
        vae=None,
    ) -> io.NodeOutput:  # fmt: skip
        hook = model.get_attachment(KEY)
        if hook is None:
            raise ValueError(
                "SLA2 Compare: connect the MODEL of SLA2 Apply Attention; this one did not come through it."
            )
        if hook.facts is None:
            raise ValueError(f"SLA2 Compare: {unsupported_reason_of(model)}.")
        if vae is not None:
            check_vae(vae, latent_for(model, latent_image))
        node, has_rival = cls.hidden.unique_id, rivals_node() is not None
        bar = comfy.utils.ProgressBar((3 if has_rival else 2) * steps)
        sampler = {"steps": steps, "cfg": cfg, "sampler_name": sampler_name, "scheduler": scheduler}
        all_layers = frozenset(range(hook.facts.num_layers))
        dense_model = install(model, AttentionSettings(dense_layers=all_layers), None)

        def sampled(name, candidate):
            show_on_node(node, f"sampling {name}")
            return measure(candidate, positive, negative, latent_image, seed, lambda: bar.update(1), sampler)

        measured = [sampled("dense", dense_model), sampled("with SLA2", model)]
        dense, sla2 = measured
        rival = against_rival(dense_model, sampled) if has_rival else None
        found = None
        if find_break_even:
            show_on_node(node, "looking for the break-even length")
            found = search_break_even(model, hook)
        name = comfy.model_management.get_torch_device_name(model.load_device)
        data = comparison_data(dense, sla2, plain(name), skips_keeps(sla2.skipped), found, rival)
        frames = decoded(vae, measured, node, data, cls) if vae is not None else {}
        line = line_to_paste(name, type(model.model).__name__, dense, sla2, rival, versions())
        text = plain("\n".join([comparison_text(data), line]))
        show_on_node(node, "done")
        latents = [latent_image | {"samples": one.latent} for one in measured]
        return io.NodeOutput(*latents, text, ui={"text": (text,), "sla2_comparison": (data,), **frames})


def decoded(vae, measured, node, data, cls):
    """The frames for the page; where the VAE fails, a row of ``data`` says so and what was measured is not lost."""
    show_on_node(node, "decoding frames")
    try:
        return {"sla2_frames": (saved_frames(vae, [one.latent for one in measured], cls),)}
    except (RuntimeError, ValueError, TypeError) as error:  # no memory, or a VAE for other latents
        logger.exception("SLA2 Compare: the VAE failed")
        data["rows"].append(["frames", plain(f"none, the VAE failed: {error}")])
        return {}


def measure(model, positive, negative, latent_image, seed, after_step, sampler):
    """Samples once; Measured. The model carries an SLA2 hook, which knows what the attention calls took."""
    device = torch.device(model.load_device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    clock = StepClock(device, after_step)
    latent = sample_once(model, positive, negative, latent_image, seed, clock, sampler)
    hook = model.get_attachment(KEY)
    run = hook.runs.finished()[-1]
    return Measured(
        latent=latent.cpu(),
        step_s=clock.seconds(),
        attention_s=attention_seconds(run, len(clock.ends)),
        sparse_calls=run.sparse_calls,
        dense_calls=run.dense_calls,
        peak=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        skipped=run.sparsity,
        error_words=error_in_words(report_data(hook, run)),
    )


def search_break_even(model, hook):
    """(tokens or None, longest length tried): the model's heads, its dtype, method and first layer's weights, on its device."""
    settings, facts, device = hook.settings, hook.facts, torch.device(model.load_device)
    precision = default_precision(device) if settings.precision == "auto" else settings.precision
    attend = attend_as(hook, device, precision)
    dtype = model.model.manual_cast_dtype or model.model.get_dtype()

    def tensors(tokens):
        generator = torch.Generator(device).manual_seed(tokens)
        shape = (1, tokens, facts.num_heads * facts.head_dim)
        return [torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(3)]

    def dense(tokens):
        q, k, v = tensors(tokens)
        return lambda: optimized_attention(q, k, v, heads=facts.num_heads)

    def sparse(tokens):
        q, k, v = (t.unflatten(-1, (facts.num_heads, -1)) for t in tensors(tokens))
        return lambda: attend(q, k, v)

    rows = time_lengths(dense, sparse, device)
    return break_even(rows), rows[-1][0]
