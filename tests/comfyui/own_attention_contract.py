"""ComfyUI 0.38's attention that a checkpoint brings along, laid over an older version's model classes."""

import functools
import sys

import torch


class ComfyAttention(torch.nn.Module):
    """The module beside an attention; function: what the checkpoint asks for."""

    function = None


class OwnAttention:
    """While open, the attention functions that ComfyUI's models call keep 0.38's contract: an attention call takes
    ``comfy_attention`` of the module that makes it, but any override in its options comes first and is not told.

    wanted: the checkpoint brings attention for every module; else for none. preferred, other: calls that it computed, and
    calls that ended in ComfyUI's usual function all the same.
    """

    def __init__(self, model, wanted=True):
        lists = (torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.Sequential)
        self.owners = [module for module in model.modules() if wanted and not isinstance(module, lists)]
        self.patched, self.wanted = [], wanted
        self.preferred = self.other = 0

    def __enter__(self):
        if not self.wanted:
            return self
        for module in self.owners:
            module.comfy_attention = ComfyAttention()
            module.comfy_attention.function = self.own
        for name, module in list(sys.modules.items()):
            function = getattr(module, "optimized_attention", None) if name.startswith("comfy.ldm") else None
            if function is not None:
                self.patched.append((module, function))
                module.optimized_attention = self._contract(function)
        return self

    def __exit__(self, *_):
        for module, function in self.patched:
            module.optimized_attention = function
        for module in self.owners:
            del module.comfy_attention

    def own(self, *args, **kwargs):
        self.preferred += 1
        return self.patched[0][1](*args, **kwargs)

    def _contract(self, function):
        @functools.wraps(function)
        def usual(*args, **kwargs):
            self.other += 1
            return function(*args, **kwargs)

        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            preferred = preferred_attention()
            if preferred is None or "_inside_attn_wrapper" in kwargs:
                return function(*args, **kwargs)
            args = [arg.take() if hasattr(arg, "take") and hasattr(arg, "peek") else arg for arg in args]
            kwargs = {**kwargs, "_inside_attn_wrapper": True}
            override = (kwargs.get("transformer_options") or {}).get("optimized_attention_override")
            return preferred(*args, **kwargs) if override is None else override(usual, *args, **kwargs)

        return wrapper


def preferred_attention():
    """What the module whose forward makes the attention call would pass along, or None."""
    frame = sys._getframe(2)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, torch.nn.Module) and hasattr(owner, "comfy_attention"):
            return owner.comfy_attention.function
        frame = frame.f_back
    return None
