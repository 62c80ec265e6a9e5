"""Marks the self-attention modules of a model: before one runs, its mark says which layer it is and passes on the call's options.

A mark is a forward pre-hook, put into a module by an object patch. ComfyUI removes an object patch by assigning the old value:
every module has the hooks' attribute, so the module is as it was before. A patched method would stay in the module's __dict__
and outlive a change of its class. A mark runs whatever forward another pack has put there, and again when training recomputes
a block.
"""

import collections
import contextlib
import functools
import inspect
import weakref

import torch

from ..compat.compiled_models import not_compiled
from ..compat.override_chain import name_of
from .model_families import class_name, module_and_method

HOOKS, WITH_KEYWORDS = "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"  # nn.Module's own, by the id of a hook
MARK_ID = "sla2_mark"
OPTIONS = "transformer_options"


def mark_layers(patched, hook, facts, diffusion_model):
    """Object patches of a ModelPatcher that mark every layer; earlier marks of ours are replaced, hooks of others kept."""
    methods = dict(method_layers(facts, diffusion_model))
    for layer, path in enumerate(facts.attention_paths):
        if layer in methods:
            continue  # no call of a module: see marked_methods
        for name, value in ((HOOKS, layer_mark(hook, layer)), (WITH_KEYWORDS, True)):
            name = f"diffusion_model.{path}.{name}"
            found = patched.get_model_object(name)
            patched.add_object_patch(name, collections.OrderedDict(found) | {MARK_ID: value})


def is_mark(name, part):
    """Whether this object patch is one of mark_layers."""
    return name.endswith((f".{HOOKS}", f".{WITH_KEYWORDS}")) and MARK_ID in part


def layer_mark(hook, layer):
    """The pre-hook of one layer's self-attention module."""

    @not_compiled
    def sla2_mark(module, args, kwargs):
        return hook.enter_layer(layer, module, module.forward, args, kwargs)

    return sla2_mark


def method_layers(facts, diffusion_model):
    """[(layer, path)] of the self-attentions that are a method and no module's forward."""
    return [
        (layer, path)
        for layer, path in enumerate(facts.attention_paths)
        if module_and_method(path, diffusion_model)[1] != "forward"
    ]


@contextlib.contextmanager
def marked_methods(hook, diffusion_model, layers, known):
    """Marks these layers of method_layers for one model call. known: WeakKeyDictionary.

    The same function serves every model call, which torch.compile would otherwise compile again each time.
    """
    placed = []
    is_ours = layers and class_name(diffusion_model) == hook.facts.layout.model_class
    try:
        for layer, path in layers if is_ours else ():
            if not is_marked(path, diffusion_model):
                module, method = module_and_method(path, diffusion_model)
                there = vars(module).get(method)
                if module not in known or known[module][0] is not there:
                    known[module] = there, _marked_method(hook, layer, module, method, there)
                setattr(module, method, known[module][1])
                placed.append((module, method, there))
        yield
    finally:
        for module, method, there in placed:
            if there is None:
                delattr(module, method)
            else:
                setattr(module, method, there)


def _marked_method(hook, layer, module, method, there):
    owner = weakref.ref(module)

    def sla2_marked_method(*args, **kwargs):
        module = owner()
        below = functools.partial(getattr(type(module), method), module) if there is None else there
        args, kwargs = enter(layer, module, below, args, kwargs) or (args, kwargs)
        return below(*args, **kwargs)

    enter = not_compiled(hook.enter_layer)
    sla2_marked_method = not_compiled(sla2_marked_method, inside=True)
    setattr(sla2_marked_method, MARK_ID, True)
    return sla2_marked_method


def is_marked(path, diffusion_model):
    """Whether the self-attention at ``path`` of this very model carries a mark."""
    module, method = module_and_method(path, diffusion_model)
    return MARK_ID in getattr(module, HOOKS, ()) or hasattr(vars(module).get(method), MARK_ID)


def has_layers(facts, diffusion_model):
    """Whether these are layers of this model at all: others may be called with the same options."""
    try:
        return is_marked(facts.attention_paths[0], diffusion_model)
    except AttributeError:
        return False


def options_given(forward, args, kwargs):
    """transformer_options of a call of ``forward``, or None where it came without."""
    if OPTIONS in kwargs:
        return kwargs[OPTIONS]
    place = _place_of_options(forward)
    return args[place] if place is not None and place < len(args) else None


def with_options(module, forward, args, kwargs, options):
    """(args, kwargs) of the call with these options, or None where ``forward`` does not take any."""
    if OPTIONS in kwargs:
        return args, {**kwargs, OPTIONS: options}
    place = _place_of_options(forward)
    if place is not None and place < len(args):
        return (*args[:place], options, *args[place + 1 :]), kwargs
    passes_on = place is None and _takes_any_keyword(forward) and _place_of_options(type(module).forward) is not None
    return (args, {**kwargs, OPTIONS: options}) if place is not None or passes_on else None


def _place_of_options(forward):
    names = list(inspect.signature(forward).parameters)
    return names.index(OPTIONS) if OPTIONS in names else None


def _takes_any_keyword(forward):
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(forward).parameters.values())


def on_the_way(facts, diffusion_model, options):
    """What other packs put between a model's call and its first layer: ["pack.module.function on blocks.0.forward", ...]."""
    found = []
    if class_name(diffusion_model) != facts.layout.model_class:
        found.append(f"{class_name(diffusion_model)} as the model's class")
    module, parts = diffusion_model, facts.attention_paths[0].split(".")
    for depth in range(len(parts) + 1):
        path = ".".join(["diffusion_model", *parts[:depth]])
        found += [f"{name_of(thing)} on {path}.{name}" for name, thing in _replaced_methods(module)]
        module = getattr(module, parts[depth], None) if depth < len(parts) else None
        if not isinstance(module, torch.nn.Module):
            break
    for kind, patches in (options.get("patches_replace") or {}).items():
        names = dict.fromkeys(map(name_of, patches.values()))
        found += [f"{name} in place of {kind} blocks" for name in names]
    return found


def _replaced_methods(module):
    """(name, function) of every method of the module's class that another pack has replaced on this module."""
    for name, thing in vars(module).items():
        own = getattr(type(module), name, None)
        if callable(own) and callable(thing) and not isinstance(thing, torch.nn.Module):
            if getattr(thing, "__func__", None) is not own and not hasattr(thing, MARK_ID):
                yield name, thing
