"""State of one patched MODEL: its sampling runs, and what each of its model calls needs to know.

patching.py puts it into a clone of a MODEL. Each self-attention call enters here once, at its mark (enter_layer); its override is
in override.py, and self_attention.py computes it.
"""

import contextlib
import logging
import math

from ..compat.override_chain import MARK
from ..compat.own_attention import PREFERRED, own_attention
from ..compat.rival_attention import ASIDE, callbacks_in
from ..runs.history import RunHistory
from ..settings.automatic import RunFacts
from ..settings.values import skips_keeps
from .layer_requests import requests_of, sol_note
from .layer_weights import LayerWeights, router_notes
from .model_call import CALL, LAYER, NO_SPAN, OVERRIDE, ModelCall
from .model_frames import ModelFrames
from .model_marks import options_given, with_options
from .override import HandedOn, OutermostOverride, say_family
from .recomputation import backward_pass
from .run_dense import RunDense, stop_where_asked
from .steps import RunSteps, guidance_halves, planned_sparsity, step_count
from .unreached import WITHOUT_OPTIONS, count_hidden, count_unmet, past_reason, require_met
from .video_tokens import VideoSpan

logger = logging.getLogger("sla2")

KEY = "sla2"  # of wrappers and attachments on the ModelPatcher
# what reading the arguments of a model call may raise if another pack has changed them
UNREADABLE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


class AttentionHook:
    """State of one patched clone, shared by its own clones. Reset for each sampling run."""

    def __init__(self, settings, router, facts, family_reason, model_sampling, sla_weights=None):
        self.settings = settings
        self.router = router
        self.sla_weights = sla_weights
        self.facts = facts
        self.family_reason = family_reason
        self.weights = LayerWeights(settings, router, facts.num_heads, sla_weights) if facts else None
        self.runs = RunHistory(facts.num_layers if facts else 0, router_notes(settings, router, sla_weights))
        self.on_run_end = None  # called with this hook and the closed RunRecord
        self.frames = ModelFrames()
        self.marked_model = lambda: None  # or a weak reference to the diffusion model that was marked
        plan_facts = _plan_facts(settings, router, facts, sla_weights) if facts else None
        self._steps = RunSteps(settings, model_sampling, facts.num_layers if facts else 0, plan_facts)
        self.handed_on = HandedOn()
        self._outermost = OutermostOverride()
        self._own_attention = (None, None, None, None)

    def begin_run(self, patcher=None, inputs=None):
        """Starts a run; ``patcher`` is the sampler's model, whose sigmas a later node may have shifted.

        inputs: function that returns what the sampler was given by name: "noise" and "sigmas".
        """
        self.runs.begin(self._steps.begin(patcher))
        if inputs is not None:
            self._steps.number_from(inputs, patcher, self.run_for_call())

    def end_run(self, failure=None, output=None):
        """Ends the run and frees what it kept on the device; the record stays for the report."""
        run = self.runs.end(failure, output)
        if run is not None:
            if self.weights is not None:
                self.weights.clear()
            self._outermost.clear()
            _log_outcome(run)
            if self.on_run_end is not None:
                self.on_run_end(self, run)

    def run_for_call(self):
        """The run under way, or one for calls that come without a sampler."""
        return self.runs.current(self._steps.begin)

    def require_met(self):
        """At the end of a sampling: with on_unsupported "stop", raises if no model call reached a marked layer."""
        require_met(self.settings, self.run_for_call())

    def see_rival(self, callbacks):
        """Takes no call of the run if ComfyUI's own sparse attention was placed after SLA2; with "stop", raises.

        callbacks: {kind: {key: [function, ...]}} of the MODEL that runs.
        """
        run = self.run_for_call()
        if run.aside or self.facts is None or not callbacks_in(callbacks):
            return
        stop_where_asked(self.settings, ASIDE)
        run.aside = ASIDE
        run.note(ASIDE)
        logger.warning("SLA2: %s", ASIDE)

    def before_model(self, device, options, inputs=dict):
        """Allocates what the sparse calls of one model call on ``device`` keep: inside the call, nothing that is kept may be.

        options: its transformer_options. inputs: function that returns its arguments by name.
        """
        if self.facts is None or self.family_reason:
            return
        run = self.run_for_call()
        step = self._steps.at(run, options, lambda: self._tokens(inputs))
        sparsities = {}
        for layer in range(self.facts.num_layers):
            with contextlib.suppress(RunDense):
                sparsities[layer] = planned_sparsity(self.settings, layer, step)
        run.prepare(device)
        self.weights.prepare(sparsities, device)
        for layer, sparsity in sparsities.items():
            if self.weights.on_device(layer, device, sparsity).fits:
                run.fitted_ratios.prepare((layer, device, sparsity, guidance_halves(options)), self.facts.num_heads)
        if run.maps is not None:
            run.maps.begin_step(options.get("sigmas"), options.get("sample_sigmas"))
            run.maps.prepare(sparsities, device)

    def model_call(self, diffusion_model, inputs, options):
        """Prepares transformer_options of one model call: the ModelCall, and our override where it got lost.

        inputs: function that returns the model's arguments by name. options: its transformer_options. Returns the ModelCall
        and the override that the options came with.
        """
        current, earlier = options.get(OVERRIDE), options.get(CALL)
        if earlier is not None and earlier.hook is self and earlier.repeated:
            return earlier, current
        run = self.run_for_call()
        run.count_model_call()
        self.see_rival(options.get("callbacks") or {})
        span = self._span(run, diffusion_model, inputs)
        if run.maps is not None:
            run.maps.begin_step(options.get("sigmas"), options.get("sample_sigmas"))
            run.maps.grid = span and span.grid
        if current is None and earlier is not None and earlier.hook is self:
            current = earlier.override  # a guider of another pack calls with these options again
        override = current if run.aside else self._outermost.of(self, run, current)
        own, requests = self._brings_attention(run, diffusion_model)
        call = ModelCall(
            self,
            run,
            diffusion_model,
            span,
            self._steps.at(run, options, lambda: None if span is None else math.prod(span.grid)),
            override=override,
            own_attention=own,
            requests=requests,
            halves=guidance_halves(options),
            steps=step_count(options),
        )
        options[CALL], options[OVERRIDE] = call, override
        # any override in the options drops the checkpoint's own attention, ours too: then the marked calls alone get it
        ours_alone = getattr(override, MARK, None) is self and override.sla2_base is None
        if override is None or (own and ours_alone):
            del options[OVERRIDE]
            if self.family_reason:
                run.note(f"every attention call runs dense: {self.family_reason}")
                say_family(self.family_reason, run)
        return call, current

    def _brings_attention(self, run, diffusion_model):
        """(whether the checkpoint chose an attention for any module, LayerRequests), looked up once per run and model."""
        known_run, known_model, own, requests = self._own_attention
        if known_run != run.number or known_model != id(diffusion_model):
            own = own_attention(diffusion_model) is not None
            requests = requests_of(self.facts, diffusion_model)
            self._own_attention = (run.number, id(diffusion_model), own, requests)
            if requests.sol and not run.aside:
                run.note(sol_note(requests.sol))
        return own, requests

    def _span(self, run, diffusion_model, inputs):
        """VideoSpan, or None if it is unknown: another family, or arguments that another pack has changed."""
        if self.facts is None:
            return None
        layout, patch_size = self.facts.layout, self.facts.patch_size
        try:
            inputs = inputs()
            prefix = layout.prefix(diffusion_model, inputs, patch_size)
            return VideoSpan(layout.grid(inputs, patch_size), prefix, layout.by_frame, layout.references(inputs))
        except UNREADABLE as error:
            run.note(f"{NO_SPAN} ({type(error).__name__}: {error})")
            return None

    def _tokens(self, inputs):
        """Number of the video's tokens in one model call, or None: its attention calls then report why it is unknown."""
        try:
            return math.prod(self.facts.layout.grid(inputs(), self.facts.patch_size))
        except UNREADABLE:
            return None

    def open_call(self, frame):
        """Prepares the ModelCall of a Frame."""
        frame.call, frame.current = self.model_call(frame.diffusion_model, frame.inputs, frame.options)
        return frame.call

    def finish(self, frame):
        """After a model call: counts one that reached no marked layer, and notices an override that did not call ours."""
        call = frame.call
        if frame.passed_on if call is None else call.repeated:
            return
        run = self.run_for_call() if call is None else call.run
        if call is None:
            run.count_model_call()
        elif call.counts["entered"]:
            if not call.counts["attended"] and not run.aside and not self.family_reason:
                self._outermost.never_called(self, run, frame.current)
            return
        if self.facts is not None and not run.aside and not run.has_hidden_calls:
            count_unmet(self.settings, self.facts, run, frame, self.marked_model())

    def enter_layer(self, layer, module, forward, args, kwargs):
        """(args, kwargs) with which a marked self-attention runs, counted; None where they stay as they are."""
        options = options_given(forward, args, kwargs) or {}
        call, frame = options.get(CALL), self.frames.current
        if call is None and frame is not None:
            call = frame.call or self.open_call(frame)
            options = {**(options or frame.options), OVERRIDE: call.override}
        if call is None:
            if backward_pass() is None:  # what gradient checkpointing recomputes is counted already
                reason = past_reason(self.facts, self.marked_model(), options)
                count_hidden(self.settings, self.run_for_call(), layer, True, reason)
            return with_options(module, forward, args, kwargs, {**options, LAYER: layer})
        if not call.repeated:
            call.counts["entered"] += 1
            call.run.count_entered(layer)
        given = {OVERRIDE: call.override, **options, CALL: call, LAYER: layer}
        if given[OVERRIDE] is None:
            del given[OVERRIDE]
        if call.own_attention and layer not in call.requests.sol:  # what is counted as dense is dense
            given[PREFERRED] = own_attention(module)
        changed = with_options(module, forward, args, kwargs, given)
        if call.repeated:
            return changed
        if call.run.aside:
            call.run.count_dense(layer, ASIDE)
        elif changed is None:
            count_hidden(self.settings, call.run, layer, call.step.in_window, WITHOUT_OPTIONS)
        return changed


def _plan_facts(settings, router, facts, sla_weights):
    """RunFacts of a patched MODEL, without those of a run."""
    takes_ratios = settings.ratio_mode == "learned" and not settings.target_error
    has_ratios = router is not None and router.sparsities and router.ratio(0, router.sparsities[0]) is not None
    return RunFacts(
        facts.layout.family,
        trained=router.sparsities if has_ratios and takes_ratios else (),
        is_sla=sla_weights is not None,
        has_target=bool(settings.target_error),
    )


def _log_outcome(run):
    if run.aside:
        return  # said as the run began
    total = run.sparse_calls + run.dense_calls
    how = f" ({run.failure})" if run.failure else ""
    skipped = skips_keeps(run.sparsity)
    logger.info("SLA2: %d of %d self-attention calls ran sparse (%s)%s", run.sparse_calls, total, skipped, how)
