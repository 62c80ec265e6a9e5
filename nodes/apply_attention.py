"""SLA2 Apply Attention: MODEL in, MODEL out, with sparse-linear attention where it pays."""

from comfy_api.latest import io

from ..sla2_kernels.references import REFERENCE_KEYS
from .attention.hook import KEY
from .attention.layer_requests import trained_for_vsa_reason
from .attention.model_families import facts_of, unsupported_reason_of
from .attention.patching import install
from .attention.weight_checks import check_router, check_sla_weights
from .load_router import Router
from .load_sla import SLAWeightsType
from .runs.outcome import show_outcomes
from .settings.automatic import untrained_limit
from .settings.presets import AUTOMATIC_PRESET, CUSTOM, NAMES, check_preset, preset_named, preset_notes
from .settings.schedule import check_schedule, parse_schedule
from .settings.values import (
    AUTOMATIC,
    METHODS,
    PRECISIONS,
    RATIO_MODES,
    AttentionSettings,
    check_layers,
    check_method,
    check_percents,
    check_ratio_mode,
    check_target,
    parse_layers,
)

RUN_DENSE, STOP = "run dense and say so", "stop"


class SLA2ApplyAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        percent = {"min": 0.0, "max": 1.0, "step": 0.001, "round": 0.001, "advanced": True}
        return io.Schema(
            node_id="SLA2ApplyAttention",
            display_name="SLA2 Apply Attention",
            category="model/sla2",
            description="Speeds up a video model: its self-attention computes the most relevant blocks exactly and the "
            "rest with linear attention. Place it last on the MODEL wire.",
            hidden=[io.Hidden.unique_id],
            # otherwise ComfyUI may reuse the cached result of another workflow's node, whose runs are reported under that node's id
            not_idempotent=True,
            search_aliases=["sparse attention", "linear attention", "SLA", "speed up Wan", "accelerate video", "SageAttention"],
            # saved workflows store widget values by position: new inputs go to the end
            inputs=[
                io.Model.Input("model", tooltip="A video model after its LoRAs: Wan in all variants, HunyuanVideo, LTX, CogVideoX, Mochi, Cosmos, "
                    "Kandinsky 5, MiniMax H3; Flux and Qwen-Image. Not supported, and unchanged: SeedVR2, the audio and "
                    "face branches of S2V, InfiniteTalk and Animate, Uni3C, Causal Wan with its cache.",),
                Router.Input("router", optional=True, tooltip="From SLA2 Load Router. Not connected: untrained."),
                io.Float.Input(
                    "sparsity", default=0.9, min=0.0, max=0.99, step=0.01, round=0.01,
                    tooltip="Share of the attention that is skipped: 0.97 skips 97%, keeps 3%.",
                ),
                io.Combo.Input(
                    "bit_width", options=list(PRECISIONS), default="auto", advanced=True,
                    tooltip="Precision inside the attention. auto: the fastest on this card (int8; fp8 on B200). "
                    "fp8 needs an RTX 40 or newer. 16bit is the most accurate.",
                ),
                io.Combo.Input(
                    "ratio_mode", options=list(RATIO_MODES), default="learned", advanced=True,
                    tooltip="How the exact and the linear branch are mixed. learned: from the router file (without one: "
                    "fitted). fitted: to a few rows computed exactly during the run. estimated: from an estimate of the attention that falls on the exact blocks. "
                    "fixed: the value below.",
                ),
                io.Float.Input(
                    "fixed_ratio", default=0.9, min=0.0, max=1.0, step=0.01, round=0.01, advanced=True,
                    tooltip="Share of the exact branch in the mix. Only used if ratio_mode is fixed.",
                ),
                io.Float.Input("start_percent", default=0.0, **percent, tooltip="Steps before this share run dense."),
                io.Float.Input("end_percent", default=1.0, **percent, tooltip="Steps after this share run dense."),
                io.String.Input(
                    "dense_layers", default="", advanced=True,
                    tooltip='Layers that always run dense, such as "0, 1, 28-29". -1 is the last layer.',
                ),
                io.Int.Input(
                    "minimum_tokens", default=AUTOMATIC, min=AUTOMATIC, max=10_000_000, advanced=True,
                    tooltip="Shorter sequences run dense, because routing would cost more than it saves. "
                    "-1: 8192. 0: always sparse.",
                ),
                io.Combo.Input(
                    "on_unsupported", options=[RUN_DENSE, STOP], default=RUN_DENSE, advanced=True,
                    tooltip="What to do if SLA2 cannot run (unsupported model, no Triton, a mask, ...).",
                ),
                io.Combo.Input(
                    "method", optional=True, options=list(METHODS), default="automatic", advanced=True,
                    tooltip="automatic: SLA where sla_weights are connected, else SLA2. top-k only: no linear part, for "
                    "LoRAs that were distilled with block top-k alone (such as lightx2v's SLA LoRAs).",
                ),
                io.Combo.Input(
                    "preset", optional=True, options=list(NAMES), default=AUTOMATIC_PRESET,
                    tooltip="Sets sparsity and schedule instead of the widgets. automatic: by model, length, number of steps "
                    "and router, as each run begins; the node says what it chose. custom: the widgets are used. Presets with "
                    "4-8 steps are for distilled models. fast needs a trained router. constant quality: each step gets the "
                    "sparsity that keeps the measured attention error at 0.12, or at target_error.",
                ),
                io.String.Input(
                    "schedule", optional=True, default="", multiline=True,
                    tooltip='Other sparsities for some steps or layers; the last matching rule applies: '
                    '"0%-20%: dense; 20%-100%: 0.8 -> 0.97; layers 0-3: 0.85", or by step number: "step 1: dense". Empty: the same sparsity everywhere.',
                ),
                SLAWeightsType.Input(
                    "sla_weights", optional=True,
                    tooltip="From SLA2 Load SLA Model: runs SLA (version 1) as these weights were trained.",
                ),
                io.Float.Input(
                    "target_error", optional=True, default=0.0, min=0.0, max=0.99, step=0.01, round=0.001, advanced=True,
                    tooltip="Attention error that the run may have, such as 0.12; each step then gets the sparsity that fits, "
                    "in place of the widget's. Needs no router. 0: off.",
                ),
                io.Combo.Input(
                    "reference_keys", optional=True, options=list(REFERENCE_KEYS), default=REFERENCE_KEYS[0], advanced=True,
                    tooltip="How reference images and videos, guides and poses are attended. routed: selected like the video, "
                    "at least one block of each. exact: always all of them, slower.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="A copy of the model that uses SLA2: connect the sampler here.")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(
        cls, dense_layers=None, start_percent=None, end_percent=None, schedule=None, preset=CUSTOM, method=None,
        ratio_mode=None, target_error=None,
    ):  # fmt: skip
        """Refuses bad settings when the prompt is queued, before a model is loaded. None: a wire, whose value comes later.

        The page shows a sentence that is raised at once; one that is returned only in its details, for every input named here.
        """
        if dense_layers is not None:
            check_layers(dense_layers)
        if start_percent is not None and end_percent is not None:
            check_percents(start_percent, end_percent)
        if method is not None:
            check_method(method)
        if ratio_mode is not None:
            check_ratio_mode(ratio_mode)
        if preset is not None:
            check_preset(preset, method, ratio_mode)
        if None not in (target_error, ratio_mode, method):
            check_target(target_error, ratio_mode, method)
        if preset == CUSTOM and schedule is not None:
            check_schedule(schedule)
        return True

    @classmethod
    def execute(
        cls, model, sparsity, bit_width, ratio_mode, fixed_ratio, start_percent, end_percent, dense_layers,
        minimum_tokens, on_unsupported, router=None, method="automatic", preset=CUSTOM, schedule="", sla_weights=None,
        target_error=0.0, reference_keys=REFERENCE_KEYS[0],
    ) -> io.NodeOutput:  # fmt: skip
        facts = facts_of(model)
        reason = unsupported_reason_of(model) or trained_for_vsa_reason(model, facts)
        if reason and on_unsupported == STOP:
            raise ValueError(f"SLA2 Apply Attention: {reason} (on_unsupported is set to stop).")
        check_preset(preset, method, ratio_mode, sla_weights is not None)
        chosen, plans_itself = preset_named(preset), preset == AUTOMATIC_PRESET
        if chosen is not None:
            sparsity, schedule, target_error = chosen.sparsity, chosen.schedule, target_error or chosen.target_error
        elif plans_itself:
            sparsity, schedule = untrained_limit(0), ""
        settings = AttentionSettings(
            sparsity=sparsity,
            precision=bit_width,
            ratio_mode=ratio_mode,
            fixed_ratio=fixed_ratio,
            start_percent=start_percent,
            end_percent=end_percent,
            dense_layers=parse_layers(dense_layers, facts.num_layers) if facts else frozenset(),
            minimum_tokens=minimum_tokens,
            stop_on_unsupported=on_unsupported == STOP,
            schedule=parse_schedule(schedule, facts.num_layers if facts else 1, parse_layers),
            method=method,
            target_error=target_error,
            reference_keys=reference_keys,
            plans_itself=plans_itself,
        )
        if target_error and sla_weights is not None:
            raise ValueError(
                "SLA2 Apply Attention: target_error does not work with SLA (version 1): set it to 0, or disconnect sla_weights."
            )
        if facts and router is not None:
            check_router(router, facts)
        if facts and sla_weights is not None:
            check_sla_weights(sla_weights, facts, method)
        patched = install(model, settings, router, sla_weights)
        patched.get_attachment(KEY).runs.add_notes(preset_notes(chosen, router, sla_weights))
        show_outcomes(patched.get_attachment(KEY), cls.hidden.unique_id, model.get_attachment(KEY))
        return io.NodeOutput(patched)
