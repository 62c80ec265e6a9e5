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

from ...sla2_kernels import default_precision, unsupported_reason
from ...sla2_kernels.loops import watch_loops
from ..compat.compiled_models import not_compiled
from ..compat.override_chain import MARK, chosen_in_comfyui, find_in, name_of, ours_in, states_of
from ..compat.own_attention import PREFERRED, own_attention
from ..compat.recording import lasting_tensors
from ..compat.rival_attention import ASIDE, callbacks_in
from ..runs.history import RunHistory
from ..runs.record import RunRecord, capturing
from ..settings.schedule import RunProgress, StepNumbers, goes_on, needs_numbers, needs_progress, sparsity_of
from ..settings.values import AUTOMATIC, skips_keeps
from .call import read_call, sizes_reason
from .failures import NOT_FINITE, attempt, check_output, not_attempted_reason
from .layer_requests import TRAINED_FOR_VSA, LayerRequests, requests_of, sol_note
from .layer_weights import LayerWeights, router_notes
from .model_frames import ModelFrames
from .model_marks import has_layers, on_the_way, options_given, with_options
from .recomputation import Decisions, backward_pass
from .sparse_call import rows_of_call, sparse_video, video_part, with_dense_rows
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
WITHOUT_OPTIONS = "this self-attention takes no transformer_options here, so that nothing can take its call over"
PAST = "the model is called past SLA2's wrappers, so that nothing says where the video's tokens lie"
OTHER_MODEL = "they were calls of a model that SLA2 was not applied to"
NOT_KNOWN = "no node is known that stands in for them"
CACHES = {"easycache", "lazycache"}  # keys of wrappers that answer model calls without the model

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
    override: Any = None  # what the marked calls of this model call run through
    own_attention: bool = False  # the checkpoint brings attention of its own for some modules
    requests: LayerRequests = LayerRequests()
    live_keys: dict = field(default_factory=dict)  # by text mask, which is kept: its address stays its own
    counts: Counter = field(default_factory=Counter)  # self-attention "entered" and "attended" in this one call
    decisions: Decisions = field(default_factory=Decisions)  # (sparsity of its sparse output or None, is it used)
    step: int | None = None  # from 1
    halves: tuple = ()  # of guidance, in the order of its batch
    steps: int | None = None  # of the run
    has_autograd: bool = field(default_factory=torch.is_grad_enabled)

    def __deepcopy__(self, memo):
        return self

    @property
    def repeated(self):
        """Whether gradient checkpointing recomputes parts of this call now, which nothing counts."""
        return self.decisions.repeated

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


def planned_sparsity(settings, layer, in_window, progress, step):
    """(sparsity, None) of a layer's calls in a step, or (None, one sentence) which setting keeps them dense."""
    reason = kept_dense_reason(settings, layer, in_window)
    sparsity = None if reason else sparsity_of(settings.schedule, layer, progress, settings.sparsity, step)
    if reason is None and sparsity is None:
        reason = "the schedule keeps this step or layer dense"
    return sparsity, reason


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
        self.runs = RunHistory(facts.num_layers if facts else 0, router_notes(settings, router, sla_weights))
        self.on_run_end = None  # called with this hook and the closed RunRecord
        self.frames = ModelFrames()
        self.live_model = lambda: None  # or a weak reference to the diffusion model that was marked
        self._inside = threading.local()
        self._own_attention = (None, None, None, None)
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

    def before_model(self, device, options):
        """Takes the memory that the sparse calls of one model call on ``device`` keep: inside it, none may be taken.

        options: its transformer_options.
        """
        if self.facts is None or self.family_reason:
            return
        run, sigmas = self.run_for_call(), options.get("sigmas")
        step = self._step_of(run, options)
        sparsities = {}
        for layer in range(self.facts.num_layers):
            sparsity, reason = planned_sparsity(self.settings, layer, *step)
            if reason is None:
                sparsities[layer] = sparsity
        run.prepare(device)
        self.weights.prepare(sparsities, device)
        for layer, sparsity in sparsities.items():
            if self.weights.on_device(layer, device, sparsity).fits:
                run.fitted_ratios.prepare((layer, device, sparsity, _halves(options)), self.facts.num_heads)
        if run.maps is not None:
            run.maps.begin_step(sigmas, options.get("sample_sigmas"))
            run.maps.prepare(sparsities, device)

    def _step_of(self, run, options):
        """(in_window, progress, number) of a step, None each where the sampler does not say."""
        sigmas = options.get("sigmas")
        progress = None if self._progress is None or sigmas is None else self._progress.at(run.sigma(sigmas))
        return run.in_window(sigmas), progress, self._step(run, sigmas, options.get("sample_sigmas"))

    def see_rival(self, callbacks):
        """Steps aside for the whole run where ComfyUI's own sparse attention was placed after us; stops where that is asked.

        callbacks: {kind: {key: [function, ...]}} of the MODEL that runs.
        """
        run = self.run_for_call()
        if run.aside or self.facts is None or not callbacks_in(callbacks):
            return
        self._stop_for(ASIDE)
        run.aside = ASIDE
        run.note(ASIDE)
        logger.warning("SLA2: %s", ASIDE)

    def _stop_for(self, reason, where=""):
        if self.settings.stop_on_unsupported:
            raise UnsupportedCall(f"SLA2 stopped{where}: {reason} (on_unsupported is set to stop).")

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
        sigmas = options.get("sigmas")
        if run.maps is not None:
            run.maps.begin_step(sigmas, options.get("sample_sigmas"))
            run.maps.grid = span and span.grid
        if current is None and earlier is not None and earlier.hook is self:
            current = earlier.override  # a guider of another pack calls with these options again
        override = current if run.aside else self._override(run, current)
        own, requests = self._brings_attention(run, diffusion_model)
        in_window, progress, step = self._step_of(run, options)
        call = ModelCall(
            self, run, diffusion_model, span, in_window, progress, override, own, requests, step=step,
            halves=_halves(options), steps=_steps(options),
        )  # fmt: skip
        options[CALL], options[OVERRIDE] = call, override
        # any override in the options drops the checkpoint's own attention, ours too: then the marked calls alone get it
        ours_alone = getattr(override, MARK, None) is self and override.sla2_base is None
        if override is None or (own and ours_alone):
            del options[OVERRIDE]
            if self.family_reason:
                self._say_family(run)
        return call, current

    def _override(self, run, current):
        """``current`` where it leads to ours, else ours in front of it."""
        known, override = self._fronted
        if current is not known or override is None:
            ours = ours_in(current, self)
            if ours is None:
                override = self._front(run, current, _replaced_note(current))
            elif current is not ours and _came_back(current, ours.sla2_base):
                override = self._front(run, current, _returned_note(current))
            else:
                override = current
            self._fronted = (current, override)
        return override

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

    def _say_family(self, run):
        run.note(f"every attention call runs dense: {self.family_reason}")
        if run.first_time(self.family_reason):
            logger.warning("SLA2: every attention call runs dense: %s", self.family_reason)

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

    def open_call(self, frame):
        """Prepares the ModelCall of a Frame."""
        frame.call, frame.current = self.model_call(frame.diffusion_model, frame.inputs, frame.options)
        return frame.call

    def finish(self, frame):
        """After a model call, as its wrapper saw it: what was never reached is counted, and how far our override came."""
        if frame.passed_on if frame.call is None else frame.call.repeated:
            return
        run = self.run_for_call() if frame.call is None else frame.call.run
        if frame.call is None:
            run.count_model_call()
        elif frame.call.counts["entered"]:
            self._look_for_ours(frame.call, frame.current)
            return
        if self.facts is not None and not run.aside and not run.has_hidden_calls:
            self._count_unmet(run, frame)

    def _look_for_ours(self, call, current):
        """Notices an override that holds ours but never called it: the next model call goes past it."""
        never_asked = not call.counts["attended"] and not call.run.aside
        if never_asked and self._fronted == (current, current) and not self.family_reason:
            self._fronted = (current, self._front(call.run, current, _replaced_note(current)))

    def _count_unmet(self, run, frame):
        """Counts a model call in which none of our marks was met; what is not known is not guessed."""
        met_before = any(record.entered for record in run.layers.values())
        wrappers = (frame.options.get("wrappers") or {}).values()
        if met_before and any(CACHES & by_key.keys() for by_key in wrappers):
            run.count_answered()
        elif not has_layers(self.facts, frame.diffusion_model):
            run.count_unmet(OTHER_MODEL)
        else:
            reason = self._in_the_way(frame.diffusion_model, frame.options) or NOT_KNOWN
            run.count_unmet(reason)
            if not met_before:
                self._stop_for(f"this model call came to none of the self-attentions that SLA2 marked: {reason}")

    def require_met(self):
        """At the end of a sampling: stops, where asked, if no mark was met in any of its model calls."""
        run = self.run_for_call()
        if run.unmet and not any(record.entered for record in run.layers.values()):
            self._stop_for(f"no model call came to the self-attentions that SLA2 marked: {next(iter(run.unmet))}")

    def _in_the_way(self, diffusion_model, options):
        names = on_the_way(self.facts, diffusion_model, options)
        return f"between the model's call and its layers there is {', '.join(names)}" if names else None

    def _front(self, run, current, note):
        run.note(note)
        return make_override(self, current)

    def enter_layer(self, layer, module, forward, args, kwargs):
        """(args, kwargs) with which a marked self-attention runs, counted; None where they stay as they are."""
        options = options_given(forward, args, kwargs) or {}
        call, frame = options.get(CALL), self.frames.current
        if call is None and frame is not None:
            call = frame.call or self.open_call(frame)
            options = {**(options or frame.options), OVERRIDE: call.override}
        if call is None:
            model = self.live_model()
            way = None if model is None else self._in_the_way(model, options)
            if backward_pass() is None:  # what gradient checkpointing recomputes is counted already
                self._count_hidden(self.run_for_call(), layer, True, f"{PAST}; {way}" if way else PAST)
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
            self._count_hidden(call.run, layer, call.in_window, WITHOUT_OPTIONS)
        return changed

    def _count_hidden(self, run, layer, in_window, reason):
        """A self-attention call that no override can take over."""
        run.has_hidden_calls = True
        kept = kept_dense_reason(self.settings, layer, in_window)
        run.count_dense(layer, kept or reason)
        if kept is None:
            self._stop_for(reason, f" in layer {layer}")
            self._say(run, layer, reason)

    def attend(self, call, layer, below, args, kwargs):
        """One marked self-attention call: sparse where it can be, else ``below`` with the arguments untouched."""
        if call.repeated:
            return self._repeat(call, layer, below, args, kwargs)
        call.counts["attended"] += 1
        request, unsupported = read_call(args, kwargs)
        sparsity, reason = planned_sparsity(self.settings, layer, call.in_window, call.progress, call.step)
        if reason is None and request is not None:
            reason = short_reason(self.settings, max(request.tokens, request.key_tokens), request.q.device)
        if reason is None:
            request, exact, reason = (None, None, unsupported) if request is None else self.exact(call, request)
            reason = TRAINED_FOR_VSA if layer in call.requests.vsa else reason
            if reason is None:
                precision = self._precision(request.q.device)
                reason = unsupported_reason(request.q.device, request.q.dtype, request.q.shape[3], precision)
            reason = reason or not_attempted_reason(call, layer)
            if reason is None:
                out, reason = self._sparse(call, layer, request, exact, sparsity, below, args, kwargs)
                if reason is None:
                    call.decisions.take(layer, (sparsity, True))
                    return out
            if reason not in DENSE_BY_NATURE:
                self._stop_for(reason, f" in layer {layer}")
            self._say(call.run, layer, reason)
        # autograd has saved tensors of a sparse output even where it is not used
        call.decisions.take(layer, (sparsity if reason == NOT_FINITE else None, False))
        return self._dense(call.run, layer, reason, below, args, kwargs)

    def _repeat(self, call, layer, below, args, kwargs):
        """A call that gradient checkpointing recomputes, as it went the first time: if it fails now, it has no other way."""
        sparsity, is_used = call.decisions.again(layer)
        if sparsity is not None:
            request, exact, _ = self.exact(call, read_call(args, kwargs)[0])
            weights = self.weights.on_device(layer, request.q.device, sparsity)
            out, *_ = self._compute(request, exact, weights, sparsity)
            if is_used:
                return self._whole(out, request, exact, below, args, kwargs)
        return self.inside(below, args, kwargs)

    def exact(self, call, request):
        """(request, ExactTokens, None), or (None, None, one sentence); keys that a text mask hides are gone."""
        reason = sizes_reason(self.facts, request)
        if reason is not None or call.span is None:
            return None, None, reason or NO_SPAN
        exact, reason = call.span.exact_tokens(request.tokens, request.key_tokens)
        if reason is None and request.mask is not None:
            mask = request.mask
            key = (mask.data_ptr(), mask.shape, mask.stride(), mask.dtype, exact)
            if not self.facts.layout.text_mask:
                reason = HAS_MASK
            elif key not in call.live_keys:
                with lasting_tensors():  # for the layers that follow
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

    def _sparse(self, call, layer, request, exact, sparsity, below, args, kwargs):
        """(output, None), or (None, one sentence) where it failed and dense attention has to do."""
        run, device = call.run, request.q.device

        def compute():
            weights = self.weights.on_device(layer, device, sparsity)
            if run.maps is not None:
                run.maps.see(layer, video_part(request, exact), weights, sparsity)
            call_ratio = self._call_ratio(call, layer, request, weights, sparsity)
            with run.timed(layer, "sparse", device), watch_loops() as loops:
                return *self._compute(request, exact, weights, sparsity, call_ratio), loops

        result, reason = attempt(call, layer, device, compute)
        reason = reason or check_output(call, layer, result[0], (request.q, request.k, request.v))
        if reason is not None:
            return None, reason
        out, ratio, kept, keys, judging, loops = result
        run.count_sparse(layer, ratio.shape, kept, keys, self._precision(device), ratio, request.tokens)
        run.count_loops(loops)
        if judging is not None:
            run.count_squares(layer, judging.squares(out))
        return self._whole(out, request, exact, below, args, kwargs), None

    def _call_ratio(self, call, layer, request, weights, sparsity):
        """CallRatio where this call's ratio is fitted. Training estimates it, whose recomputed calls must find it again, and
        so does a call that a CUDA graph captures, in which the choice of rows may not be copied to the device."""
        q, k, v = request.q, request.k, request.v
        trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v))
        # the first pass of a checkpoint that enters its blocks without autograd
        trains = trains or (call.has_autograd and not torch.is_grad_enabled())
        if not weights.fits or trains or capturing(q.device):
            return None
        kind = layer, q.device, sparsity, call.halves
        return call.run.fitted_ratios.of_call(kind, self.facts.num_heads, call.steps)

    def _compute(self, request, exact, weights, sparsity, call_ratio=None):
        part, precision = video_part(request, exact), self._precision(request.q.device)
        return sparse_video(
            part, exact, weights, sparsity=sparsity, precision=precision, scale=request.scale, call_ratio=call_ratio
        )

    def _whole(self, out, request, exact, below, args, kwargs):
        """The call's output: ``out`` of the video's queries, and the other rows as ``below`` computes them."""

        def dense_rows(rows):
            new_args, new_kwargs = rows_of_call(args, kwargs, rows)
            return self.inside(below, new_args, new_kwargs)

        return with_dense_rows(out, request, exact, dense_rows)

    def _precision(self, device):
        return default_precision(device) if self.settings.bit_width == "auto" else self.settings.bit_width

    def _say(self, run, layer, reason):
        if run.first_time(reason):
            logger.warning(
                "SLA2: layer %s runs dense: %s (said once per run; the report counts every call)", layer, reason
            )


def _halves(options):
    """Which halves of guidance a model call's batch holds."""
    return tuple(options.get("cond_or_uncond") or ())


def _steps(options):
    """Steps of the run, or None where the sampler does not say."""
    sigmas = options.get("sample_sigmas")
    return None if sigmas is None else len(sigmas) - 1


def _replaced_note(current):
    if current is None:
        return "a later node removed the attention override; SLA2 put itself back"
    return (
        f"a later node replaced the attention override with {name_of(current)}, which does not call SLA2; "
        "SLA2 put itself back in front of it, and it runs the dense calls (place that node before SLA2 Apply Attention)"
    )


def _came_back(current, base):
    """Whether ``current`` is of a node whose override lies below ours already: it put itself in front again."""
    states = {id(state) for state in states_of(current)}
    return find_in(base, lambda function: any(id(state) in states for state in states_of(function))) is not None


def _returned_note(current):
    return (
        f"{name_of(current)} put itself in front of SLA2, which was placed after it: SLA2 went back in front of it, "
        "and it runs the calls that SLA2 does not take"
    )


def _log_outcome(run):
    if run.aside:
        return  # said as the run began
    sparse = sum(record.sparse for record in run.layers.values())
    dense = sum(record.dense.total() + record.unreached for record in run.layers.values())
    how = f" ({run.failure})" if run.failure else ""
    logger.info(
        "SLA2: %d of %d self-attention calls ran sparse (%s)%s",
        sparse, sparse + dense, skips_keeps(run.sparsity), how,
    )  # fmt: skip


def make_override(hook, base):
    """The attention override: a closure over ``hook`` that falls back to ``base``, the override that was there before."""
    base_name = base and name_of(chosen_in_comfyui(base) or base)

    @not_compiled
    def sla2_attention_override(func, *args, **kwargs):
        options = kwargs.get("transformer_options") or {}
        call, layer = options.get(CALL), options.get(LAYER)
        func = options.get(PREFERRED) or func
        below = func if base is None else functools.partial(base, func)
        counted_as_it_entered = layer is not None and (call is None or call.run.aside)
        if hook.is_inside or (call is not None and call.hook is not hook):
            return below(*args, **kwargs)
        name = name_of(func) if base is None else base_name
        run = hook.run_for_call() if call is None else call.run

        def below_seen(*args, **kwargs):
            if call is None or not call.repeated:
                run.see_handed_on(name, args, kwargs)
            return below(*args, **kwargs)

        if counted_as_it_entered:
            return hook.inside(below_seen, args, kwargs)
        if call is None or layer is None or hook.family_reason:
            if call is None or not call.repeated:
                run.count_other(hook.family_reason)
            if hook.family_reason and run.first_time(hook.family_reason):
                logger.warning("SLA2: every attention call runs dense: %s", hook.family_reason)
            return hook.inside(below_seen, args, kwargs)
        run.see_backend(name_of(func))
        return hook.attend(call, layer, below_seen, args, kwargs)

    setattr(sla2_attention_override, MARK, hook)
    sla2_attention_override.sla2_base = base
    return sla2_attention_override
