"""The one place that meets ComfyUI's attention: decides per call sparse or dense, and says why.

patching.py puts it into a clone of a MODEL.
"""

import functools
import logging
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch

from ..sla2_kernels import default_precision, unsupported_reason
from .attention_call import read_call
from .compiled_models import not_compiled
from .layer_weights import LayerWeights, router_notes
from .override_chain import MARK, leads_to, name_of
from .run_history import RunHistory
from .run_record import RunRecord
from .schedule import RunProgress, StepNumbers, goes_on, needs_numbers, needs_progress, sparsity_of
from .settings import AUTOMATIC, skips_keeps
from .sparse_call import rows_of_call, sparse_video, video_part, with_dense_rows
from .sparse_failure import attempt, check_output, not_attempted_reason
from .text_mask import HAS_MASK, live_keys
from .video_tokens import DENSE_BY_NATURE, VideoSpan

logger = logging.getLogger("sla2")

KEY = "sla2"  # of wrappers and attachments on the ModelPatcher
CALL = "sla2_call"  # in transformer_options: the ModelCall of this model call
LAYER = "sla2_layer"  # in transformer_options: the layer whose self-attention is running
OVERRIDE = "optimized_attention_override"
NO_NUMBER = "the sampler does not say which step this is: the schedule's rules for numbered steps do not count"
GOES_ON = "this sampler goes on with what another one began: the schedule's rules for numbered steps do not count in it"
NO_SPAN = "the model's arguments do not say where the video's tokens lie"

# device type -> fewest tokens for which sparse attention is worth its routing
MINIMUM_TOKENS = {"cuda": 8192, "cpu": 8192}


def automatic_minimum_tokens(device):
    """What minimum_tokens = -1 means on ``device``."""
    return MINIMUM_TOKENS.get(torch.device(device).type, 8192)


class UnsupportedCall(RuntimeError):
    """A call that SLA2 cannot take, where the user asked to stop."""


@dataclass(frozen=True)
class ModelCall:
    """One call of the diffusion model: what its attention calls need to know. in_window, progress, step: None where unknown."""

    hook: Any
    run: RunRecord
    diffusion_model: Any
    span: VideoSpan | None
    in_window: bool | None
    progress: float | None = None
    live_keys: dict = field(default_factory=dict)  # by text mask, which is kept: its address stays its own
    counts: Counter = field(default_factory=Counter)  # self-attention "entered" and "attended" in this one call
    step: int | None = None  # from 1

    def __deepcopy__(self, memo):
        return self

    @property
    def grid(self):
        """(t, h, w) of the video's tokens, or None."""
        return None if self.span is None else self.span.grid


def kept_dense_reason(settings, layer, in_window):
    """None, or one sentence which setting keeps this layer's call dense."""
    if layer in settings.dense_layers:
        return "dense_layers keeps this layer dense"
    if in_window is None:
        return "the sampler does not say which step this is, and start_percent or end_percent is set"
    if not in_window:
        return "the step lies outside start_percent to end_percent"
    return None


def short_reason(settings, tokens, device):
    """None, or one sentence where a sequence is too short to gain."""
    least = settings.minimum_tokens
    if least == AUTOMATIC:
        least = automatic_minimum_tokens(device)
    return f"the sequence has {tokens} tokens, minimum_tokens is {least}" if tokens < least else None


class AttentionHook:
    """State of one patched clone, shared by its own clones. Reset for each sampling run."""

    def __init__(self, settings, router, facts, family_reason, model_sampling, sla_weights=None):
        self.settings = settings
        self.router = router
        self.sla_weights = sla_weights
        self.facts = facts
        self.family_reason = family_reason
        self.model_sampling = model_sampling
        self.weights = LayerWeights(settings, router, facts.num_heads, sla_weights) if facts else None
        self.runs = RunHistory(router_notes(settings, router, sla_weights))
        self.on_run_end = None  # called with this hook and the closed RunRecord
        self._inside = threading.local()
        self._fronted = (None, None)
        self._progress = None
        self._numbers = StepNumbers()

    def begin_run(self, patcher=None, inputs=None):
        """Starts a run; ``patcher`` is the sampler's model, whose sigmas a later node may have shifted.

        inputs: function that returns what the sampler was given by name: "noise" and "sigmas".
        """
        self.runs.begin(self._window(patcher))
        if inputs is not None and needs_numbers(self.settings.schedule):
            given, sampling = inputs(), self._sampling(patcher)
            self._numbers = StepNumbers(goes_on(given.get("noise"), given.get("sigmas"), sampling.sigma_max))
            if self._numbers.goes_on:
                self.run_for_call().note(GOES_ON)

    def end_run(self, failure=None, output=None):
        """Ends the run and lets go of what it left on the device; the record stays for the report."""
        run = self.runs.end(failure, output)
        if run is not None:
            if self.weights is not None:
                self.weights.clear()
            self._fronted = (None, None)
            _log_outcome(run)
            if self.on_run_end is not None:
                self.on_run_end(self, run)

    def _sampling(self, patcher):
        return self.model_sampling if patcher is None else patcher.get_model_object("model_sampling")

    def _window(self, patcher=None):
        sampling, self._numbers = self._sampling(patcher), StepNumbers()
        self._progress = RunProgress(sampling.percent_to_sigma) if needs_progress(self.settings.schedule) else None
        if self.settings.whole_run:
            return None
        ends = (self.settings.start_percent, self.settings.end_percent)
        return tuple(float(sampling.percent_to_sigma(percent)) for percent in ends)

    def run_for_call(self):
        """The run under way, or one for calls that come without a sampler."""
        return self.runs.current(self._window)

    def model_call(self, diffusion_model, inputs, options):
        """Prepares transformer_options of one model call: the ModelCall, and our override where it got lost.

        inputs: function that returns the model's arguments by name. options: its transformer_options.
        """
        run = self.run_for_call()
        run.count_model_call()
        span = self._span(run, diffusion_model, inputs)
        grid, sigmas = span and span.grid, options.get("sigmas")
        if run.maps is not None:
            run.maps.begin_model_call(options.get("sigmas"), options.get("sample_sigmas"), grid)
        progress = None if self._progress is None or sigmas is None else self._progress.at(run.sigma(sigmas))
        step = self._step(run, sigmas, options.get("sample_sigmas"))
        call = options[CALL] = ModelCall(self, run, diffusion_model, span, run.in_window(sigmas), progress, step=step)
        current = options.get(OVERRIDE)
        known, override = self._fronted
        if current is not known or override is None:
            override = current if leads_to(current, self) else self._front(run, current)
            self._fronted = (current, override)
        options[OVERRIDE] = override
        return call, current

    def _step(self, run, sigmas, sample_sigmas):
        if not needs_numbers(self.settings.schedule) or self._numbers.goes_on:
            return None
        if sigmas is None or sample_sigmas is None:
            run.note(NO_NUMBER)
            return None
        return self._numbers.at(run.sigma(sigmas), sample_sigmas)

    def _span(self, run, diffusion_model, inputs):
        """VideoSpan, or None where nobody knows it: another family, or a call that another pack shaped in its own way."""
        if self.facts is None:
            return None
        layout, patch_size = self.facts.layout, self.facts.patch_size
        try:
            inputs = inputs()
            front = layout.front(diffusion_model, inputs, patch_size)
            return VideoSpan(layout.grid(inputs, patch_size), front, layout.by_frame)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            run.note(f"{NO_SPAN} ({type(error).__name__}: {error})")
            return None

    def after_model_call(self, call, current):
        """Notices an override that holds ours but never called it: the next model call goes past it."""
        if self.facts is not None and not call.counts["entered"] and not call.run.has_hidden_calls:
            call.run.count_answered()
        never_asked = call.counts["entered"] and not call.counts["attended"]
        if never_asked and self._fronted == (current, current) and not self.family_reason:
            self._fronted = (current, self._front(call.run, current))

    def _front(self, run, current):
        run.note(_replaced_note(current))
        return make_override(self, current)

    def attend(self, call, layer, below, args, kwargs):
        """One marked self-attention call: sparse where it can be, else ``below`` with the arguments untouched."""
        call.counts["attended"] += 1
        request, unsupported = read_call(args, kwargs)
        sparsity = sparsity_of(self.settings.schedule, layer, call.progress, self.settings.sparsity, call.step)
        reason = kept_dense_reason(self.settings, layer, call.in_window)
        if reason is None and sparsity is None:
            reason = "the schedule keeps this step or layer dense"
        if reason is None and request is not None:
            reason = short_reason(self.settings, max(request.tokens, request.key_tokens), request.q.device)
        if reason is None:
            request, exact, reason = (None, None, unsupported) if request is None else self.exact(call, request)
            if reason is None:
                precision = self._precision(request.q.device)
                reason = unsupported_reason(request.q.device, request.q.dtype, request.q.shape[3], precision)
            reason = reason or not_attempted_reason(call, layer)
            if reason is None:
                out, reason = self._sparse(call, layer, request, exact, sparsity, precision, below, args, kwargs)
                if reason is None:
                    return out
            if self.settings.stop_on_unsupported and reason not in DENSE_BY_NATURE:
                raise UnsupportedCall(f"SLA2 stopped in layer {layer}: {reason} (on_unsupported is set to stop).")
            self._say(call.run, layer, reason)
        return self._dense(call.run, layer, reason, below, args, kwargs)

    def exact(self, call, request):
        """(request, ExactTokens, None), or (None, None, one sentence); keys that a text mask hides are gone."""
        if call.span is None:
            return None, None, NO_SPAN
        exact, reason = call.span.exact_tokens(request.tokens, request.key_tokens)
        if reason is None and request.mask is not None:
            mask = request.mask
            key = (mask.data_ptr(), mask.shape, mask.stride(), mask.dtype, exact)
            if not self.facts.layout.text_mask:
                reason = HAS_MASK
            elif key not in call.live_keys:
                call.live_keys[key] = mask, live_keys(mask, exact)
            if reason is None:
                live, reason = call.live_keys[key][1]
            if reason is None:
                request, exact = live.of(request, exact)
        return (request, exact, None) if reason is None else (None, None, reason)

    def _dense(self, run, layer, reason, below, args, kwargs):
        run.count_dense(layer, reason)
        tensor = args[0] if args else kwargs.get("q")
        device = tensor.device if isinstance(tensor, torch.Tensor) else torch.device("cpu")
        with run.timed(layer, "dense", device):
            return self.inside(below, args, kwargs)

    def inside(self, below, args, kwargs):
        """Calls down the chain; an override there that leads back to us is passed through uncounted."""
        was = self.is_inside
        self._inside.value = True
        try:
            return below(*args, **kwargs)
        finally:
            self._inside.value = was

    @property
    def is_inside(self):
        return getattr(self._inside, "value", False)

    def _sparse(self, call, layer, request, exact, sparsity, precision, below, args, kwargs):
        """(output, None), or (None, one sentence) where it failed and dense attention has to do."""
        run, part, device = call.run, video_part(request, exact), request.q.device

        def compute():
            weights = self.weights.on_device(layer, device, sparsity)
            if run.maps is not None:
                run.maps.see(layer, part, weights, sparsity)
            with run.timed(layer, "sparse", device):
                return sparse_video(part, exact, weights, sparsity=sparsity, precision=precision, scale=request.scale)

        def dense_rows(rows):
            new_args, new_kwargs = rows_of_call(args, kwargs, rows)
            return self.inside(below, new_args, new_kwargs)

        result, reason = attempt(call, layer, device, compute)
        reason = reason or check_output(call, layer, result[0], (request.q, request.k, request.v))
        if reason is not None:
            return None, reason
        out, ratio, kept, keys = result
        run.count_sparse(layer, ratio.shape, kept, keys, precision, ratio, request.tokens)
        return with_dense_rows(out, request, exact, dense_rows), None

    def _precision(self, device):
        return default_precision(device) if self.settings.bit_width == "auto" else self.settings.bit_width

    def _say(self, run, layer, reason):
        if run.first_time(reason):
            logger.warning(
                "SLA2: layer %s runs dense: %s (said once per run; the report counts every call)", layer, reason
            )


def _replaced_note(current):
    if current is None:
        return "a later node removed the attention override; SLA2 put itself back"
    return (
        f"a later node replaced the attention override with {name_of(current)}, which does not call SLA2; "
        "SLA2 put itself back in front of it, and it runs the dense calls (place that node before SLA2 Apply Attention)"
    )


def _log_outcome(run):
    sparse = sum(record.sparse for record in run.layers.values())
    dense = sum(record.dense.total() + record.unreached for record in run.layers.values())
    how = f" ({run.failure})" if run.failure else ""
    logger.info(
        "SLA2: %d of %d self-attention calls ran sparse (%s)%s",
        sparse, sparse + dense, skips_keeps(run.sparsity), how,
    )  # fmt: skip


def make_override(hook, base):
    """The attention override: a closure over ``hook`` that falls back to ``base``, the override that was there before."""

    @not_compiled
    def sla2_attention_override(func, *args, **kwargs):
        below = func if base is None else functools.partial(base, func)
        options = kwargs.get("transformer_options") or {}
        call, layer = options.get(CALL), options.get(LAYER)
        if hook.is_inside or (call is not None and call.hook is not hook):
            return below(*args, **kwargs)
        if call is None or layer is None or hook.family_reason:
            run = hook.run_for_call() if call is None else call.run
            run.count_other(hook.family_reason)
            if hook.family_reason and run.first_time(hook.family_reason):
                logger.warning("SLA2: every attention call runs dense: %s", hook.family_reason)
            return hook.inside(below, args, kwargs)
        call.run.see_backend(name_of(func))
        return hook.attend(call, layer, below, args, kwargs)

    setattr(sla2_attention_override, MARK, hook)
    sla2_attention_override.sla2_base = base
    return sla2_attention_override
