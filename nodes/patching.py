"""Puts the hook into a clone of a MODEL: an override, wrappers, and a mark on every self-attention module.

The clone carries an attention override, wrappers (around sampling, before and around each model call) and, per layer, an object
patch that marks the self-attention calls. All are closures over one AttentionHook, because ComfyUI copies model options
deeply in places, and functions are what such a copy shares.
"""

import operator

from .attention_hook import CALL, KEY, LAYER, MARK, OVERRIDE, AttentionHook, make_override
from .compiled_models import not_compiled
from .model_layouts import model_facts, module_and_method, unsupported_model_reason
from .recomputation import backward_pass
from .video_tokens import call_inputs, latent_of

WITHOUT_OPTIONS = "the model passes no options here (as with a KV cache), so that nothing can take this call over"


def marked_forward(layer, path, original, replaced, method="forward", hook=None):
    """Object patch of one self-attention module's forward: marks its calls with the layer, then runs the module.

    The module is looked up in the model of the call (a training node works on a copy of the model); ``original`` serves
    calls that come without one. ``replaced`` is the object patch of another node, called instead where there is one.
    """
    find = operator.attrgetter(path.removesuffix(f".{method}"))

    @not_compiled
    def enter(kwargs):
        """(module, keywords) of one call, counted."""
        options = kwargs.get("transformer_options")
        call = options.get(CALL) if options else None
        if call is not None:
            if not call.repeated:
                call.counts["entered"] += 1
                call.run.count_entered(layer)
            return find(call.diffusion_model), {**kwargs, "transformer_options": {**options, LAYER: layer}}
        if hook is not None and backward_pass() is None:
            run = hook.run_for_call()
            run.has_hidden_calls = True
            run.count_dense(layer, WITHOUT_OPTIONS)
        return original, kwargs

    def forward(*args, **kwargs):
        module, kwargs = enter(kwargs)
        if replaced is not None:
            return replaced(*args, **kwargs)
        return getattr(type(module), method)(module, *args, **kwargs)

    forward = not_compiled(forward, inside=True)
    forward.sla2_replaced = replaced
    return forward


def options_of(args, kwargs):
    """transformer_options among the arguments of a model call, or None."""
    return kwargs.get("transformer_options") or next((a for a in reversed(args) if isinstance(a, dict)), None)


def install(model, settings, router, sla_weights=None):
    """A patched clone of a ComfyUI ModelPatcher; its hook is the attachment "sla2". An earlier SLA2 on it is replaced.

    router: RouterWeights or None. sla_weights: SLAWeights (v1) or None.
    """
    from comfy.patcher_extension import WrappersMP

    patched = model.clone()
    diffusion_model = patched.model.diffusion_model
    facts = model_facts(diffusion_model)
    reason, sampling = unsupported_model_reason(diffusion_model), patched.get_model_object("model_sampling")
    hook = AttentionHook(settings, router, facts, reason, sampling, sla_weights)

    def around_sampling(executor, *args, **kwargs):
        hook.begin_run(getattr(executor.class_obj, "model_patcher", None))
        failure, output = "stopped before its end", None
        try:
            output = executor(*args, **kwargs)
            failure = None
            return output
        finally:
            hook.end_run(failure, output)

    reserve = not_compiled(hook.before_model)
    prepare, finish = not_compiled(hook.model_call), not_compiled(hook.after_model_call)

    def before_model(executor, *args, **kwargs):
        device = latent_of({"x": args[0]} if args else kwargs).device
        reserve(device, options_of(args, kwargs) or {})
        return executor(*args, **kwargs)

    def around_model(executor, *args, **kwargs):
        options = options_of(args, kwargs)
        if options is None:
            return executor(*args, **kwargs)
        diffusion_model = getattr(executor.class_obj, "diffusion_model", executor.class_obj)
        call, current = prepare(diffusion_model, lambda: call_inputs(executor.original, args, kwargs), options)
        output = executor(*args, **kwargs)
        finish(call, current)
        return output

    around = WrappersMP.DIFFUSION_MODEL if facts is None else getattr(WrappersMP, facts.layout.wrapper)
    wrappers = (
        (WrappersMP.OUTER_SAMPLE, around_sampling),
        (WrappersMP.APPLY_MODEL, not_compiled(before_model, inside=True)),
        (around, not_compiled(around_model, inside=True)),
    )
    for kind in {kind for kind, _ in wrappers}:
        patched.remove_wrappers_with_key(kind, KEY)
    for kind, wrapper in wrappers:
        patched.add_wrapper_with_key(kind, KEY, wrapper)
    options = patched.model_options.setdefault("transformer_options", {})
    base, earlier = options.get(OVERRIDE), patched.get_attachment(KEY)
    if earlier is not None and getattr(base, MARK, None) is earlier:
        base = base.sla2_base
    options[OVERRIDE] = make_override(hook, base)
    patched.set_attachments(KEY, hook)
    for layer, path in enumerate(facts.attention_paths if facts else ()):
        _mark_layer(patched, hook, diffusion_model, layer, path)
    return patched


def _mark_layer(patched, hook, diffusion_model, layer, path):
    module, method = module_and_method(path, diffusion_model)
    path = path.removesuffix(f".{method}")
    name = f"diffusion_model.{path}.{method}"
    found = patched.get_model_object(name)
    if hasattr(found, "sla2_replaced"):
        replaced = found.sla2_replaced
    else:
        replaced = None if getattr(found, "__func__", None) is getattr(type(module), method) else found
    patched.add_object_patch(name, marked_forward(layer, path, module, replaced, method, hook))
