"""The attention that a checkpoint brings along (ComfyUI 0.38): for its calls that SLA2 does not take.

ComfyUI puts a ComfyAttention module, ``comfy_attention``, beside every attention, and passes it to each call; as soon as any
override is in the call's options it is dropped.
"""

import torch

PREFERRED = "sla2_preferred"  # in transformer_options of a marked call: the function that the checkpoint asks for


def function_of(module):
    """The attention function that a checkpoint chose for this very module, or None."""
    return getattr(getattr(module, "comfy_attention", None), "function", None)


def own_attention(module):
    """The same for an attention module or a block that holds one; also whether a whole model holds any."""
    if not isinstance(module, torch.nn.Module):
        return None
    return next((found for part in module.modules() if (found := function_of(part)) is not None), None)
