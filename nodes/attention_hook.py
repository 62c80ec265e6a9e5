"""The one place that meets ComfyUI's attention: decides per call sparse or dense, and says why.

A patched clone of a MODEL carries an attention override, two wrappers (around sampling, around each model call) and, per
layer, an object patch that marks the self-attention calls. All are closures over one AttentionHook, because ComfyUI
copies model options deeply in places, and functions are what such a copy shares.
"""

import functools
import logging
import operator
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch

from ..sla2_kernels import default_precision, sla2_attention
from .attention_call import read_call, unsupported_call_reason
from .layer_weights import LayerWeights, router_notes
from .model_layouts import model_facts, unsupported_model_reason
from .override_chain import MARK, leads_to, name_of
from .run_history import RunHistory
from .run_record import RunRecord
from .settings import AUTOMATIC, skips_keeps

logger = logging.getLogger("sla2")

KEY = "sla2"  # of wrappers and attachments on the ModelPatcher
CALL = "sla2_call"  # in transformer_options: the ModelCall of this model call
LAYER = "sla2_layer"  # in transformer_options: the layer whose self-attention is running
OVERRIDE = "optimized_attention_override"

# device type -> fewest tokens for which sparse attention is worth its routing
MINIMUM_TOKENS = {"cuda": 8192, "cpu": 8192}


def automatic_minimum_tokens(device):
    """What minimum_tokens = -1 means on ``device``."""
    return MINIMUM_TOKENS.get(torch.device(device).type, 8192)


class UnsupportedCall(RuntimeError):
    """A call that SLA2 cannot take, where the user asked to stop."""


@dataclass(frozen=True)
class ModelCall:
    """One call of the diffusion model: what its attention calls need to know. in_window is None where unknown."""

    hook: Any
    run: RunRecord
    diffusion_model: Any
    grid: tuple | None
    in_window: bool | None
    counts: Counter = field(default_factory=Counter)  # self-attention "entered" and "attended" in this one call

    def __deepcopy__(self, memo):
        return self


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

    def __init__(self, settings, router, facts, family_reason, model_sampling):
        self.settings = settings
        self.router = router
        self.facts = facts
        self.family_reason = family_reason
        self.model_sampling = model_sampling
        self.weights = LayerWeights(settings, router, facts.num_heads) if facts else None
        self.runs = RunHistory(router_notes(settings, router))
        self.on_run_end = None  # called with the closed RunRecord
        self._inside = threading.local()
        self._fronted = (None, None)

    def begin_run(self, patcher=None):
        """Starts a run; ``patcher`` is the sampler's model, whose sigmas a later node may have shifted."""
        self.runs.begin(self._window(patcher))

    def end_run(self, failure=None, output=None):
        """Ends the run and lets go of what it left on the device; the record stays for the report."""
        run = self.runs.end(failure, output)
        if run is not None:
            if self.weights is not None:
                self.weights.clear()
            self._fronted = (None, None)
            _log_outcome(run, self.settings)
            if self.on_run_end is not None:
                self.on_run_end(run)

    def _window(self, patcher=None):
        if self.settings.whole_run:
            return None
        sampling = self.model_sampling if patcher is None else patcher.get_model_object("model_sampling")
        ends = (self.settings.start_percent, self.settings.end_percent)
        return tuple(float(sampling.percent_to_sigma(percent)) for percent in ends)

    def run_for_call(self):
        """The run under way, or one for calls that come without a sampler."""
        return self.runs.current(self._window)

    def model_call(self, diffusion_model, args, options):
        """Prepares transformer_options of one model call: the ModelCall, and our override where it got lost."""
        run = self.run_for_call()
        run.count_model_call()
        grid = self.facts.layout.grid(args, options, self.facts.patch_size) if self.facts else None
        if run.maps is not None:
            run.maps.begin_model_call(options.get("sigmas"), options.get("sample_sigmas"), grid)
        call = options[CALL] = ModelCall(self, run, diffusion_model, grid, run.in_window(options.get("sigmas")))
        current = options.get(OVERRIDE)
        known, override = self._fronted
        if current is not known or override is None:
            override = current if leads_to(current, self) else self._front(run, current)
            self._fronted = (current, override)
        options[OVERRIDE] = override
        return call, current

    def after_model_call(self, call, current):
        """Notices an override that holds ours but never called it: the next model call goes past it."""
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
        reason = kept_dense_reason(self.settings, layer, call.in_window)
        if reason is None and request is not None:
            reason = short_reason(self.settings, request.tokens, request.q.device)
        if reason is None:
            precision = None if request is None else self._precision(request.q.device)
            reason = unsupported or unsupported_call_reason(request, precision, call.grid)
            if reason is None:
                return self._sparse(call.run, layer, request, precision)
            if self.settings.stop_on_unsupported:
                raise UnsupportedCall(f"SLA2 stopped in layer {layer}: {reason} (on_unsupported is set to stop).")
            self._say(call.run, layer, reason)
        return self._dense(call.run, layer, reason, below, args, kwargs)

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

    def _sparse(self, run, layer, request, precision):
        proj_q, proj_k, alpha = self.weights.on_device(layer, request.q.device)
        q, k, v = request.q, request.k, request.v
        if not request.flat_output:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if run.maps is not None:
            layout = "BNHD" if request.flat_output else "BHND"
            run.maps.see(layer, q, k, proj_q, proj_k, self.settings.sparsity, layout)
        with run.timed(layer, "sparse", q.device):
            out, ratio = sla2_attention(
                q, k, v, proj_q, proj_k, alpha,
                sparsity=self.settings.sparsity, precision=precision, scale=request.scale,
                layout="BNHD" if request.flat_output else "BHND", return_alpha=True,
            )  # fmt: skip
        run.count_sparse(layer, ratio.shape, self.settings.sparsity, precision, ratio)
        return out.flatten(2) if request.flat_output else out

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


def _log_outcome(run, settings):
    sparse = sum(record.sparse for record in run.layers.values())
    dense = sum(record.dense.total() + record.unreached for record in run.layers.values())
    how = f" ({run.failure})" if run.failure else ""
    logger.info(
        "SLA2: %d of %d self-attention calls ran sparse (%s)%s",
        sparse, sparse + dense, skips_keeps(settings.sparsity), how,
    )  # fmt: skip


def make_override(hook, base):
    """The attention override: a closure over ``hook`` that falls back to ``base``, the override that was there before."""

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
        return hook.attend(call, layer, below, args, kwargs)

    setattr(sla2_attention_override, MARK, hook)
    sla2_attention_override.sla2_base = base
    return sla2_attention_override


def marked_forward(layer, path, original, replaced):
    """Object patch of one self-attention module's forward: marks its calls with the layer, then runs the module.

    The module is looked up in the model of the call (a training node works on a copy of the model); ``original`` serves
    calls that come without one. ``replaced`` is the object patch of another node, called instead where there is one.
    """
    find = operator.attrgetter(path)

    def forward(*args, **kwargs):
        module, options = original, kwargs.get("transformer_options")
        call = options.get(CALL) if options else None
        if call is not None:
            module = find(call.diffusion_model)
            call.counts["entered"] += 1
            call.run.count_entered(layer)
            kwargs["transformer_options"] = {**options, LAYER: layer}
        if replaced is not None:
            return replaced(*args, **kwargs)
        return type(module).forward(module, *args, **kwargs)

    forward.sla2_replaced = replaced
    return forward


def install(model, settings, router):
    """A patched clone of a ComfyUI ModelPatcher; its hook is the attachment "sla2". An earlier SLA2 on it is replaced."""
    from comfy.patcher_extension import WrappersMP

    patched = model.clone()
    diffusion_model = patched.model.diffusion_model
    facts = model_facts(diffusion_model)
    hook = AttentionHook(
        settings, router, facts, unsupported_model_reason(diffusion_model), patched.get_model_object("model_sampling")
    )

    def around_sampling(executor, *args, **kwargs):
        hook.begin_run(getattr(executor.class_obj, "model_patcher", None))
        failure, output = "stopped before its end", None
        try:
            output = executor(*args, **kwargs)
            failure = None
            return output
        finally:
            hook.end_run(failure, output)

    def around_model(executor, *args, **kwargs):
        options = kwargs.get("transformer_options") or next((a for a in reversed(args) if isinstance(a, dict)), None)
        if options is None:
            return executor(*args, **kwargs)
        call, current = hook.model_call(executor.class_obj, args, options)
        output = executor(*args, **kwargs)
        hook.after_model_call(call, current)
        return output

    for kind, wrapper in ((WrappersMP.OUTER_SAMPLE, around_sampling), (WrappersMP.DIFFUSION_MODEL, around_model)):
        patched.remove_wrappers_with_key(kind, KEY)
        patched.add_wrapper_with_key(kind, KEY, wrapper)
    options = patched.model_options.setdefault("transformer_options", {})
    base, earlier = options.get(OVERRIDE), patched.get_attachment(KEY)
    if earlier is not None and getattr(base, MARK, None) is earlier:
        base = base.sla2_base
    options[OVERRIDE] = make_override(hook, base)
    patched.set_attachments(KEY, hook)
    for layer, path in enumerate(facts.attention_paths if facts else ()):
        _mark_layer(patched, diffusion_model, layer, path)
    return patched


def _mark_layer(patched, diffusion_model, layer, path):
    name, module = f"diffusion_model.{path}.forward", operator.attrgetter(path)(diffusion_model)
    found = patched.get_model_object(name)
    if hasattr(found, "sla2_replaced"):
        replaced = found.sla2_replaced
    else:
        replaced = None if getattr(found, "__func__", None) is type(module).forward else found
    patched.add_object_patch(name, marked_forward(layer, path, module, replaced))
