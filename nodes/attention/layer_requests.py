"""Layers whose weights need a certain attention: trained for VSA, or asking for ComfyUI's own sparse attention.

VSA: FastH3 has a gate in each layer (``to_gate_compress``) that only VSA uses. The layer learned to rely on VSA's coarse branch,
so any other sparse attention degrades it: SLA2 runs it dense.

comfy_kitchen_sol: a checkpoint or a LoRA can ask for it per layer (ComfyUI 0.38 and newer: ``comfy_attention.config``, one
request or a list). It brings no weights, and placing SLA2 on the MODEL is the later and the more explicit choice: SLA2 takes the
layer's calls, and those that it keeps dense are dense.
"""

from dataclasses import dataclass

import torch

from ..settings.values import layers_text
from .model_families import diffusion_model_of, module_and_method

SOL = "comfy_kitchen_sol"
TRAINED_FOR_VSA = (
    "the weights were trained for VSA (they have to_gate_compress, as in FastH3), and other sparse attention spoils them: "
    "use ComfyUI's Model Sparse Attention with method vsa in place of SLA2"
)


@dataclass(frozen=True)
class LayerRequests:
    """Layers that were trained for VSA, and layers that ask for comfy_kitchen_sol, each rising."""

    vsa: tuple = ()
    sol: tuple = ()


def requests_of(facts, diffusion_model):
    """LayerRequests of a diffusion model with these ModelFacts (None: of no known family); none where it lacks the layers."""
    paths = facts.attention_paths if facts else ()
    try:
        modules = [(layer, module_and_method(path, diffusion_model)[0]) for layer, path in enumerate(paths)]
    except AttributeError:  # another model, called with the same options
        return LayerRequests()
    vsa = tuple(layer for layer, module in modules if _is_trained_for_vsa(module))
    return LayerRequests(vsa, tuple(layer for layer, module in modules if _asks_for_sol(module)))


def trained_for_vsa_reason(patcher, facts):
    """None, or one sentence where layers of a MODEL with these ModelFacts, or None, were trained for VSA."""
    return TRAINED_FOR_VSA if requests_of(facts, diffusion_model_of(patcher)).vsa else None


def sol_note(layers):
    """The report's sentence about the layers that ask for comfy_kitchen_sol."""
    named = f"layer {layers[0]} asks" if len(layers) == 1 else f"layers {layers_text(layers)} ask"
    return (
        f"{named} for {SOL}, ComfyUI's own sparse attention: SLA2 takes these calls, because it was placed on this MODEL "
        "(without SLA2 Apply Attention they run as the checkpoint or LoRA asks)"
    )


def _is_trained_for_vsa(module):
    return any(getattr(part, "to_gate_compress", None) is not None for part in _parts(module))


def _asks_for_sol(module):
    return any(SOL in _methods(getattr(part, "comfy_attention", None)) for part in _parts(module))


def _parts(module):
    return module.modules() if isinstance(module, torch.nn.Module) else ()


def _methods(comfy_attention):
    config = getattr(comfy_attention, "config", None)
    requests = config if isinstance(config, (list, tuple)) else [config]
    return [request.get("attention") for request in requests if isinstance(request, dict)]
