"""What runs the attention of a MODEL and what else touches it, in plain words; what is unknown is named by module.function."""

from collections import Counter

from ..compat.override_chain import chosen_in_comfyui, name_of, ours_in
from .hook import KEY
from .model_call import OVERRIDE
from .model_marks import is_mark

BACKENDS = {
    "attention_basic": "ComfyUI's basic attention",
    "attention_split": "ComfyUI's split attention",
    "attention_sub_quad": "ComfyUI's sub-quadratic attention",
    "attention_xformers": "xFormers",
    "attention_pytorch": "PyTorch's scaled_dot_product_attention",
    "attention_flash": "FlashAttention",
    "attention_sage": "SageAttention",
    "attention3_sage": "SageAttention 3",
    "attention_comfy_kitchen_int8": "comfy-kitchen's INT8 attention",
}
ADAPTERS = {"boft": "BOFT", "glora": "GLoRA", "loha": "LoHa", "lokr": "LoKr", "lora": "LoRA", "oft": "OFT"}
WRAPPERS = {
    "easycache": "EasyCache",
    "lazycache": "LazyCache",
    "torch.compile": "torch.compile",
    "ContextWindows_prepare_sampling": "context windows",
    "ContextWindows_sampler_sample": "context windows",
}


def attention_stack(model, hook=None, run=None):
    """{"attention": sentence, "also": [what, ...]} of a ModelPatcher. hook, run: SLA2's on it and the run shown, or None."""
    override = model.model_options.get("transformer_options", {}).get(OVERRIDE)
    if hook is None:
        attention = _below(override, None)
    else:
        ours = ours_in(override, hook)
        first = f"{name_of(override)}, which holds SLA2" if ours not in (None, override) else "SLA2"
        base = override if ours is None else ours.sla2_base
        attention = f"{first}; its dense calls run in {_below(base, run)}"
    return {"attention": attention, "also": list(dict.fromkeys(_neighbours(model)))}


def stack_lines(stack):
    also = ", ".join(stack["also"]) or "nothing"
    return [f"attention of this model: {stack['attention']}", f"also on this model: {also}"]


def _below(override, run):
    if override is None:
        names = run.backends if run and run.backends else {_default_backend()}
        return " and ".join(sorted(map(_backend, names)))
    chosen = chosen_in_comfyui(override)
    return name_of(override) if chosen is None else f"{_backend(name_of(chosen))}, which a node chose for this model"


def _default_backend():
    from comfy.ldm.modules import attention

    return name_of(attention.optimized_attention)


def _backend(name):
    module, _, function = name.rpartition(".")
    return BACKENDS.get(function, name) if module == "comfy.ldm.modules.attention" else name


def _neighbours(model):
    options = model.model_options.get("transformer_options", {})
    yield from _changed_weights(model.patches)
    yield from ("LoRA in bypass mode" if key == "bypass_lora" else f"the injection {key}" for key in model.injections)
    yield from _replaced_parts(model.object_patches)
    for registered in (model.wrappers, options.get("wrappers", {}), model.callbacks, options.get("callbacks", {})):
        yield from _registered(registered)
    yield from _around_model_calls(model.model_options)
    yield from _in_blocks(options)


def _changed_weights(patches):
    kinds = Counter(kind for on_weight in patches.values() for kind in {_kind(patch[1]) for patch in on_weight})
    yield from (f"{kind} on {_many(count, 'weight')}" for kind, count in kinds.items())


def _replaced_parts(object_patches):
    in_model = {name: part for name, part in object_patches.items() if name.startswith("diffusion_model")}
    names = Counter(_part(part) for name, part in in_model.items() if not is_mark(name, part))
    yield from (f"{name} on {_many(count, 'part')} of the model" for name, count in names.items())


def _registered(functions_by_kind):
    for by_key in functions_by_kind.values():
        for key, functions in by_key.items():
            if key != KEY:
                yield from (WRAPPERS.get(key, name_of(function)) for function in functions)


def _around_model_calls(model_options):
    if model_options.get("context_handler") is not None:
        yield "context windows"
    for key in ("model_function_wrapper", "sampler_calc_cond_batch_function"):
        if model_options.get(key) is not None:
            yield name_of(model_options[key])


def _in_blocks(options):
    for kind, patches in options.get("patches", {}).items():
        yield from (f"{name_of(patch)} as {kind}" for patch in patches)
    for kind, patches in options.get("patches_replace", {}).items():
        names = Counter(map(name_of, patches.values()))
        yield from (f"{name} in place of {_many(count, f'{kind} block')}" for name, count in names.items())


def _part(part):
    return "torch.compile" if type(part).__name__ == "OptimizedModule" else name_of(part)


def _kind(patch):
    """LoRA and the like by its name; a plain change of a weight, (kind, values), by ComfyUI's word for it.

    A list is the weight of another model and the patches on it, as model merging nodes leave it.
    """
    if isinstance(patch, list):
        return "a merged model"
    if isinstance(patch, tuple) and patch and isinstance(patch[0], str):
        return ADAPTERS.get(patch[0], f"the weight patch {patch[0]}")
    return ADAPTERS.get(getattr(patch, "name", None), name_of(patch))


def _many(count, thing):
    return f"{count} {thing}{'' if count == 1 else 's'}"
