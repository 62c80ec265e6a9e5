"""Nodes that put faults below the pack in a running ComfyUI, and count what it keeps."""

import ctypes
import gc
import resource
import sys
from pathlib import Path

import torch


def module_of_the_pack(name):
    return next(module for key, module in list(sys.modules.items()) if key.endswith(f".nodes.{name}"))


def out_of_memory(result):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB (made up by a test).")


def no_kernel(result):
    raise PermissionError(13, "Permission denied", "/somewhere/.triton/cache")


def not_a_number(result):
    result[0].view(-1)[5] = float("nan")
    return result


KINDS = {"out of memory": out_of_memory, "no kernel": no_kernel, "NaN": not_a_number}


class SLA2TestFault:
    """The sparse call with this number, counted from 1 over all layers, fails; 0: none does any more."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "arm"
    CATEGORY = "sla2 tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"model": ("MODEL",), "kind": (list(KINDS),), "number": ("INT", {}), "label": ("STRING", {})}
        }

    def arm(self, model, kind, number, label):
        way = module_of_the_pack("attention.self_attention")
        compute, count = getattr(way.sparse_request, "computes", way.sparse_request), [0]

        def sparse_request(*args, **kwargs):
            count[0] += 1
            result = compute(*args, **kwargs)
            return KINDS[kind](result) if count[0] == number else result

        sparse_request.computes = compute
        way.sparse_request = sparse_request
        return (model,)


class SLA2TestLateFailure:
    """Another pack's attention, which fails in its call with this number."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "sla2 tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "number": ("INT", {}), "label": ("STRING", {})}}

    def patch(self, model, number, label):
        count = [0]

        def override(func, *args, **kwargs):
            count[0] += 1
            if count[0] == number:
                raise RuntimeError("the neighbour fails late")
            return func(*args, **kwargs)

        patched = model.clone()
        patched.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = override
        return (patched,)


class SLA2TestCensus:
    """How many run records, hooks and tensors are alive; bytes in tensors, and bytes of the process that lie in RAM."""

    RETURN_TYPES = ()
    FUNCTION = "count"
    CATEGORY = "sla2 tests"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"latent": ("LATENT",), "label": ("STRING", {})}}

    def count(self, latent, label):
        gc.collect()
        # freed memory goes back to the system, so that what is resident is in use
        ctypes.CDLL(None).malloc_trim(0)
        kinds = [type(thing).__name__ for thing in gc.get_objects() if not isinstance(thing, (dict, list, tuple))]
        found = {name: kinds.count(name) for name in ("RunRecord", "AttentionHook", "ModelCall", "Tensor")}
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return {"ui": {"census": [found | {"resident": pages * resource.getpagesize()}]}}


NODE_CLASS_MAPPINGS = {cls.__name__: cls for cls in (SLA2TestFault, SLA2TestLateFailure, SLA2TestCensus)}
