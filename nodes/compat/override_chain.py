"""Who calls whom among attention overrides: whether an override that a later node installed still leads to ours."""

import functools
import inspect
import re
import types

import torch

MARK = "sla2_hook"
MAX_OBJECTS = 500
SET_BY_COMFY = "comfy.model_patcher.ModelPatcher.set_model_optimized_attention.optimized_attention_override"


def ours_in(override, hook):
    """The override of ``hook`` that calling ``override`` can reach, or None."""
    return find_in(override, lambda function: getattr(function, MARK, None) is hook)


def find_in(override, is_wanted):
    """The first function that calling ``override`` can reach and is_wanted: closures, partials, defaults, attributes."""
    queue, seen = [override], set()
    while queue and len(seen) < MAX_OBJECTS:
        thing = queue.pop(0)
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, types.FunctionType) and is_wanted(thing):
            return thing
        queue.extend(_parts(thing))
    return None


def _parts(thing):
    if isinstance(thing, (type, types.ModuleType, torch.Tensor, torch.nn.Module, str, bytes, int, float, type(None))):
        return ()
    if isinstance(thing, functools.partial):
        return (thing.func, *thing.args, *thing.keywords.values())
    if isinstance(thing, types.MethodType):
        return (thing.__func__, thing.__self__)
    if isinstance(thing, types.FunctionType):
        return (
            *closed_over(thing).values(),
            *(thing.__defaults__ or ()),
            *(thing.__kwdefaults__ or {}).values(),
            *vars(thing).values(),
        )
    if isinstance(thing, dict):
        return tuple(thing.values())
    if isinstance(thing, (list, tuple, set, frozenset)):
        return tuple(thing)
    return tuple(getattr(thing, "__dict__", {}).values())


def closed_over(function):
    """{name: value} of a function's closure; {} for what is no Python function."""
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    cells = getattr(function, "__closure__", None) or ()
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True) if _is_filled(cell)}


def states_of(function):
    """The objects of its own that a function or method carries: what functions of one node share, and no others."""
    if isinstance(function, types.MethodType):
        return [function.__self__, *states_of(function.__func__)]
    shared = (types.FunctionType, types.MethodType, types.ModuleType, type, torch.nn.Module, torch.Tensor)
    return [
        value
        for value in closed_over(function).values()
        if hasattr(value, "__dict__") and not isinstance(value, shared)
    ]


def _is_filled(cell):
    try:
        cell.cell_contents  # noqa: B018  reading an empty cell is what raises
    except ValueError:
        return False
    return True


def chosen_in_comfyui(override):
    """The attention function that an override made by ComfyUI wraps, else None."""
    if isinstance(override, types.FunctionType) and name_of(override) == SET_BY_COMFY:
        return inspect.getclosurevars(override).nonlocals.get("optimized_attention")
    return None


def name_of(override):
    """A name for the report: module and function, or the class of a callable object."""
    function = override.func if isinstance(override, functools.partial) else override
    name = getattr(function, "__qualname__", type(function).__qualname__)
    # ComfyUI names a pack's module by the path of its folder
    module = re.split(r"[\\/]", getattr(function, "__module__", None) or "?")[-1].replace("_x_", ".")
    return f"{module}.{name.replace('.<locals>', '')}"
