"""Attention calls as ComfyUI's Wan and LTX classes make them from 0.37 on, laid over an older version's classes."""

import functools
import sys

import comfy.ldm.modules.attention

# None before ComfyUI 0.32
CONTAINER = getattr(comfy.ldm.modules.attention, "AttentionTensorContainer", None)


class Containers:
    """While open, every class hands q, k and v to ComfyUI's attention in containers of which each is emptied once.

    calls: attention calls that came in containers. kept: containers that were still full after their call.
    """

    def __init__(self):
        self.patched, self.calls, self.kept = [], 0, 0

    def __enter__(self):
        for name, module in list(sys.modules.items()) if CONTAINER else ():
            for function in ("optimized_attention", "optimized_attention_masked"):
                if name.startswith("comfy.ldm") and hasattr(module, function):
                    before = getattr(module, function)
                    self.patched.append((module, function, before))
                    setattr(module, function, self._contract(before))
        return self

    def __exit__(self, *_):
        for module, name, before in self.patched:
            setattr(module, name, before)

    def _contract(self, function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            if len(args) < 3 or "_inside_attn_wrapper" in kwargs:
                return function(*args, **kwargs)
            held = [arg if isinstance(arg, CONTAINER) else CONTAINER(arg) for arg in args[:3]]
            out = function(*held, *args[3:], **kwargs)
            self.calls += 1
            self.kept += sum(container.tensor is not None for container in held)
            return out

        return wrapper
