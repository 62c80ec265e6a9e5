"""LoRA by PEFT on a Wan model of either naming, and the file that ComfyUI's LoRA loaders take."""

import os
import re

import safetensors.torch
import torch

# Wan's own names, as ComfyUI has them, and diffusers' names for the same layers
DIFFUSERS_PARTS = (("attn1.", "self_attn."), ("attn2.", "cross_attn."), ("to_out.0", "o"), ("to_q", "q"), ("to_k", "k"),
                   ("to_v", "v"), ("ffn.net.0.proj", "ffn.0"), ("ffn.net.2", "ffn.2"))  # fmt: skip
WAN_LAYER = re.compile(r"blocks\.\d+\.((self_attn|cross_attn)\.[qkvo]|ffn\.[02])")


def wan_name(name):
    """A module's name as Wan and ComfyUI spell it: "blocks.0.attn1.to_q" -> "blocks.0.self_attn.q"."""
    for theirs, ours in DIFFUSERS_PARTS:
        name = name.replace(theirs, ours)
    return name


def add_lora(model, rank, alpha, targets, seed=0):
    """Puts LoRA adapters of ``rank`` into the linear layers of ``targets`` ("self_attn", "cross_attn", "ffn") of each block.

    Raises ValueError where the model has no such layers.
    """
    from peft import LoraConfig, inject_adapter_in_model

    wanted = []
    for name, module in model.named_modules():
        found = WAN_LAYER.fullmatch(wan_name(name))
        if found and isinstance(module, torch.nn.Linear) and found[1].split(".")[0] in targets:
            wanted.append(name)
    if not wanted:
        raise ValueError(f"{type(model).__name__} has no layers named like a Wan transformer's {', '.join(targets)}.")
    torch.manual_seed(seed)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=wanted), model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return model


def set_lora_scale(model, scale):
    """Multiplies what every adapter adds; 0 leaves the model as it was."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_scale("default", scale)


def place_in_file(name):
    """(layer, "lora_down" or "lora_up") of an adapter's weight as ComfyUI's files name them; None for any other weight."""
    layer, dot, rest = name.partition(".lora_")
    if not dot:
        return None
    return f"diffusion_model.{wan_name(layer.split('model.')[-1])}", "lora_down" if rest.startswith("A") else "lora_up"


def comfyui_lora(state, alpha):
    """ComfyUI's LoRA of PEFT's tensors: {"diffusion_model.blocks.0.self_attn.q.lora_down.weight": ...}, 16 bit.

    state: {name of the adapter's weight: tensor}, as the student's state dict has them.
    """
    found = {}
    for name, tensor in state.items():
        if place := place_in_file(name):
            layer, kind = place
            found[f"{layer}.{kind}.weight"] = tensor.detach().to("cpu", torch.bfloat16).contiguous()
            found[f"{layer}.alpha"] = torch.tensor(float(alpha))
    return found


def save_lora(path, state, alpha, about):
    """Writes comfyui_lora(state) whole or not at all; ``about``: text for the file's metadata."""
    replace_file(path, lambda draft: safetensors.torch.save_file(comfyui_lora(state, alpha), draft, {"about": about}))


def replace_file(path, write):
    """Writes beside the file, then renames over it: a run that is cut off leaves a whole file."""
    draft = f"{path}.part"
    write(draft)
    os.replace(draft, path)
