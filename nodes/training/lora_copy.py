"""The copy of a MODEL that is trained, as core's own LoRA training makes it."""

import comfy.model_sampling
import torch


def training_copy(model):
    """A clone of a MODEL with weights of its own, read from the file again; it computes in bfloat16 where that did in float16.

    Raises ValueError with one sentence where the model cannot be copied or trained.
    """
    sampling = model.get_model_object("model_sampling")
    if not isinstance(sampling, comfy.model_sampling.CONST):
        raise ValueError("SLA2 Train LoRA: only flow-matching models such as Wan can be trained, and this is not one.")
    if model.cached_patcher_init is None:
        raise ValueError(
            "SLA2 Train LoRA: this MODEL comes from a loader that ComfyUI cannot repeat, as those for GGUF files do; "
            "load it with Load Diffusion Model or Load Checkpoint."
        )
    if model.injections:
        raise ValueError(
            "SLA2 Train LoRA: a LoRA on this MODEL is in bypass mode, which the copy that is trained would lose; "
            "load it without bypass."
        )
    copy = model.clone(force_deepcopy=True)
    copy.model.requires_grad_(False)
    if copy.model.get_dtype_inference() == torch.float16:
        # small gradients underflow in float16
        copy.set_model_compute_dtype(torch.bfloat16)
    return copy
