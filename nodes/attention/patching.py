"""Puts the hook into a clone of a MODEL: an override, wrappers, and a mark on every self-attention module.

The clone carries an attention override, wrappers (around sampling, before and around each model call) and, per layer, object
patches that mark the self-attention calls. All are closures over one AttentionHook, because ComfyUI copies model options
deeply in places, and functions are what such a copy shares.
"""

import weakref

from ..compat.compiled_models import graphs_of_its_own, not_compiled
from ..compat.override_chain import MARK
from ..compat.rival_attention import take_off
from ..settings.values import AttentionSettings
from .hook import KEY, AttentionHook
from .model_call import OVERRIDE
from .model_families import diffusion_model_of, facts_of, unsupported_reason_of
from .model_frames import Frame
from .model_marks import mark_layers, marked_methods, method_layers
from .override import make_override
from .video_tokens import apply_inputs, call_inputs, latent_of


def options_of(args, kwargs):
    """transformer_options among the arguments of a model call, or None."""
    return kwargs.get("transformer_options") or next((a for a in reversed(args) if isinstance(a, dict)), None)


def install_dense(model, layers, make_override):
    """A patched clone whose ``layers`` self-attention layers run dense, their marked calls through make_override(base).

    base: the attention override that was on ``model``, or None.
    """
    patched = model.clone()
    take_off(patched)
    options = patched.model_options.setdefault("transformer_options", {})
    options[OVERRIDE] = make_override(options.get(OVERRIDE))
    return install(patched, AttentionSettings(dense_layers=frozenset(range(layers))), None)


def install(model, settings, router, sla_weights=None):
    """A patched clone of a ComfyUI ModelPatcher; its hook is the attachment "sla2". An earlier SLA2 on it is replaced.

    router: RouterWeights or None. sla_weights: SLAWeights (v1) or None.
    """
    from comfy.patcher_extension import WrappersMP

    patched = model.clone()
    taken_off = take_off(patched)
    facts, diffusion_model = facts_of(patched), diffusion_model_of(patched)
    reason, sampling = unsupported_reason_of(patched), patched.get_model_object("model_sampling")
    hook = AttentionHook(settings, router, facts, reason, sampling, sla_weights)
    hook.marked_model = weakref.ref(diffusion_model)
    if taken_off:
        hook.runs.add_notes([taken_off])

    def around_sampling(executor, *args, **kwargs):
        patcher = getattr(executor.class_obj, "model_patcher", None)
        hook.begin_run(patcher, lambda: call_inputs(executor.original, args, kwargs))
        failure, output = "stopped before its end", None
        try:
            hook.see_rival({} if patcher is None else patcher.callbacks)
            output = executor(*args, **kwargs)
            hook.require_met()
            failure = None
            return output
        finally:
            hook.end_run(failure, output)

    methods, known_methods = method_layers(facts, diffusion_model) if facts else [], weakref.WeakKeyDictionary()
    reserve = not_compiled(hook.before_model)
    open_call, finish = not_compiled(hook.open_call), not_compiled(hook.finish)

    def before_model(executor, *args, **kwargs):
        device = latent_of({"x": args[0]} if args else kwargs).device
        reserve(device, options_of(args, kwargs) or {}, lambda: apply_inputs(executor.original, args, kwargs))
        return executor(*args, **kwargs)

    def around_call(executor, args, kwargs, inputs, is_next_to_the_model):
        """One model call as one wrapper sees it."""
        options = options_of(args, kwargs)
        if options is None:
            return executor(*args, **kwargs)
        diffusion_model = getattr(executor.class_obj, "diffusion_model", executor.class_obj)
        diffusion_model = getattr(diffusion_model, "_orig_mod", diffusion_model)
        frame = Frame(diffusion_model, lambda: inputs(executor.original, args, kwargs), options)
        marked = marked_methods(hook, diffusion_model, methods, known_methods)
        with hook.frames.opened(frame), marked, graphs_of_its_own():
            if is_next_to_the_model:
                open_call(frame)
            output = executor(*args, **kwargs)
            finish(frame)
        return output

    def around_model(executor, *args, **kwargs):
        return around_call(executor, args, kwargs, call_inputs, True)

    def around_apply(executor, *args, **kwargs):
        """Where another pack replaced the model's forward, ComfyUI's wrappers next to the model are never entered."""
        return around_call(executor, args, kwargs, apply_inputs, False)

    next_to_the_model = WrappersMP.DIFFUSION_MODEL if facts is None else getattr(WrappersMP, facts.layout.wrapper)
    wrappers = [(WrappersMP.OUTER_SAMPLE, around_sampling)]
    if facts is not None:
        wrappers.append((WrappersMP.APPLY_MODEL, not_compiled(before_model, inside=True)))
        if next_to_the_model != WrappersMP.APPLY_MODEL:
            wrappers.append((WrappersMP.APPLY_MODEL, not_compiled(around_apply, inside=True)))
    wrappers.append((next_to_the_model, not_compiled(around_model, inside=True)))
    for kind in (WrappersMP.OUTER_SAMPLE, WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL):
        patched.remove_wrappers_with_key(kind, KEY)
    for kind, wrapper in wrappers:
        patched.add_wrapper_with_key(kind, KEY, wrapper)
    options = patched.model_options.setdefault("transformer_options", {})
    base, earlier = options.get(OVERRIDE), patched.get_attachment(KEY)
    if earlier is not None and getattr(base, MARK, None) is earlier:
        base = base.sla2_base
    options[OVERRIDE] = make_override(hook, base)
    patched.set_attachments(KEY, hook)
    if facts is not None:
        mark_layers(patched, hook, facts, diffusion_model)
    return patched
