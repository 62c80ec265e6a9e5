"""Nodes that the tests link into ComfyUI beside the pack: conditioning without a text encoder, and awkward neighbours."""

import copy
import functools

import torch

OVERRIDE = "optimized_attention_override"


class SLA2TestConditioning:
    """Random text conditioning of Wan's shape. Another label makes ComfyUI sample again instead of asking its cache."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "sla2 tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "number": ("INT", {"default": 0}),
                "tokens": ("INT", {"default": 512}),
                "label": ("STRING", {}),
            }
        }

    def make(self, number, tokens, label):
        generator = torch.Generator().manual_seed(number)
        return ([[torch.randn(1, tokens, 4096, generator=generator) * 0.1, {}]],)


class SLA2TestNeighbour:
    """Another pack's attention override, on the same MODEL."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "sla2 tests"

    @classmethod
    def INPUT_TYPES(cls):
        kinds = ["chains", "overwrites", "removes", "copies options", "fails"]
        return {"required": {"model": ("MODEL",), "kind": (kinds,)}}

    def patch(self, model, kind):
        patched = model.clone()
        if kind == "copies options":
            patched.model_options = copy.deepcopy(patched.model_options)
            return (patched,)
        options = patched.model_options.setdefault("transformer_options", {})
        previous = options.pop(OVERRIDE, None)
        if kind == "removes":
            return (patched,)

        def override(func, *args, **kwargs):
            if kind == "fails":
                raise RuntimeError("the neighbour's override fails")
            below = functools.partial(previous, func) if kind == "chains" and previous else func
            return below(*args, **kwargs)

        options[OVERRIDE] = override
        return (patched,)


NODE_CLASS_MAPPINGS = {cls.__name__: cls for cls in (SLA2TestConditioning, SLA2TestNeighbour)}
