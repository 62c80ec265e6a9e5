"""Nodes that the tests link into ComfyUI beside the pack: conditioning without a text encoder, and awkward neighbours."""

import copy
import functools
import types

import torch

from .stand_ins import CLASSES as STAND_INS

OVERRIDE = "optimized_attention_override"


class SLA2TestConditioning:
    """Random text conditioning of Wan's shape. Another label makes ComfyUI sample again instead of asking its cache."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "sla2 tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"number": ("INT", {}), "image": ("BOOLEAN", {}), "label": ("STRING", {})}}

    def make(self, number, image, label):
        generator = torch.Generator().manual_seed(number)
        extra = {}
        if image:
            states = torch.randn(1, 257, 1280, generator=generator)
            extra["clip_vision_output"] = types.SimpleNamespace(penultimate_hidden_states=states)
        return ([[torch.randn(1, 512, 4096, generator=generator) * 0.1, extra]],)


class SLA2TestNeighbour:
    """Another pack's attention override, on the same MODEL."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "sla2 tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "kind": ([*OVERRIDES, "removes", "copies options"],)}}

    def patch(self, model, kind):
        patched = model.clone()
        if kind == "copies options":
            patched.model_options = copy.deepcopy(patched.model_options)
            return (patched,)
        options = patched.model_options.setdefault("transformer_options", {})
        previous = options.pop(OVERRIDE, None)
        if kind != "removes":
            options[OVERRIDE] = OVERRIDES[kind](previous)
        return (patched,)


class SLA2TestUnknownModel:
    """Makes the loaded model one of a class that nobody knows. Only for a file that no other test loads."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "sla2 tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def patch(self, model):
        diffusion_model = model.model.diffusion_model
        if type(diffusion_model).__name__ != "UnknownModel":
            diffusion_model.__class__ = type("UnknownModel", (type(diffusion_model),), {})
        return (model.clone(),)


class SLA2TestQuantisedLoader:
    """A diffusion model whose linear weights stay 8-bit integers and are unpacked in every call, as GGUF loaders do."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"
    CATEGORY = "sla2 tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": ("STRING", {})}}

    def load(self, name):
        import comfy.ops
        import comfy.sd
        import comfy.utils
        import folder_paths

        class Linear(comfy.ops.manual_cast.Linear):
            def forward(self, x):
                if not hasattr(self, "packed"):
                    weight = self.weight.float()
                    self.scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
                    self.packed = (weight / self.scale).round().to(torch.int8)
                weight = (self.packed.float() * self.scale).to(x.dtype)
                return torch.nn.functional.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))

        operations = type("QuantisedOps", (comfy.ops.manual_cast,), {"Linear": Linear})
        state = comfy.utils.load_torch_file(folder_paths.get_full_path("diffusion_models", name))
        return (comfy.sd.load_diffusion_model_state_dict(state, model_options={"custom_operations": operations}),)


class SLA2TestAnything:
    """A text for an input of any kind, such as another pack's node that chooses a file."""

    RETURN_TYPES = ("*",)
    FUNCTION = "give"
    CATEGORY = "sla2 tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"text": ("STRING", {})}}

    def give(self, text):
        return (text,)


class SLA2TestOlderComfyUI:
    """Takes away what our training nodes ask a newer ComfyUI for, or gives it back."""

    RETURN_TYPES = ()
    FUNCTION = "switch"
    OUTPUT_NODE = True
    CATEGORY = "sla2 tests"
    taken = {}

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"older": ("BOOLEAN", {})}}

    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")

    def switch(self, older):
        import comfy.model_management as management
        from comfy.model_patcher import ModelPatcher

        if older:
            self.taken.update(clone=ModelPatcher.clone, in_training=vars(management).pop("in_training"))
            ModelPatcher.clone = lambda patcher, *arguments: self.taken["clone"](patcher, *arguments)
        else:
            ModelPatcher.clone, management.in_training = self.taken.pop("clone"), self.taken.pop("in_training")
        return ()


def chaining(previous):
    def override(func, *args, **kwargs):
        below = functools.partial(previous, func) if previous else func
        return below(*args, **kwargs)

    return override


def overwriting(previous):
    def override(func, *args, **kwargs):
        return func(*args, **kwargs)

    return override


def forgetful(previous):
    def override(func, *args, **kwargs):
        return func(*args, **kwargs) if previous is not None else None

    return override


def failing(previous):
    def override(func, *args, **kwargs):
        raise RuntimeError("the neighbour's override fails")

    return override


OVERRIDES = {"chains": chaining, "overwrites": overwriting, "keeps but never calls": forgetful, "fails": failing}
NODE_CLASS_MAPPINGS = {
    cls.__name__: cls
    for cls in (
        SLA2TestAnything,
        SLA2TestConditioning,
        SLA2TestNeighbour,
        SLA2TestOlderComfyUI,
        SLA2TestQuantisedLoader,
        SLA2TestUnknownModel,
        *STAND_INS,
    )
}
