"""Who calls whom among attention overrides: whether an override that a later node installed still leads to ours."""

import functools
import inspect
import re
import types

import torch

MARK = "sla2_hook"
MOST_OBJECTS = 500
SET_BY_COMFY = "comfy.model_patcher.ModelPatcher.set_model_optimized_attention.optimized_attention_override"


def leads_to(override, hook):
    """True where calling ``override`` can reach an override of ``hook``."""
    return ours_in(override, hook) is not None


def ours_in(override, hook):
    """The override of ``hook`` that calling ``override`` can reach, or None: closures, partials, defaults, attributes."""
    queue, seen = [override], set()
    while queue and len(seen) < MOST_OBJECTS:
        thing = queue.pop(0)
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, types.FunctionType) and getattr(thing, MARK, None) is hook:
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
        cells = [cell.cell_contents for cell in thing.__closure__ or () if _is_filled(cell)]
        return (*cells, *(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values(), *vars(thing).values())
    if isinstance(thing, dict):
        return tuple(thing.values())
    if isinstance(thing, (list, tuple, set, frozenset)):
        return tuple(thing)
    return tuple(getattr(thing, "__dict__", {}).values())


def _is_filled(cell):
    try:
        cell.cell_contents  # noqa: B018  reading an empty cell is what raises
    except ValueError:
        return False
    return True


def chosen_in_comfyui(override):
    """The attention function of an override that ComfyUI made of it, else None."""
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
