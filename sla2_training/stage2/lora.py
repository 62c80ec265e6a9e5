"""LoRA by PEFT on a Wan model of either naming, the file that ComfyUI's LoRA loaders take, and files by others, merged."""

import logging
import re
from dataclasses import dataclass

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from sla2_kernels.whole_file import write_whole

from ..errors import TrainingError
from .data import dtype_name

logger = logging.getLogger(__name__)

# diffusers' names and Wan's own, which ComfyUI has, of the same layers
DIFFUSERS_PARTS = {
    "attn1": "self_attn", "attn2": "cross_attn", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o",
    "add_k_proj": "k_img", "add_v_proj": "v_img", "norm_added_k": "norm_k_img",
    "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2", "norm2": "norm3", "norm3": "norm2", "proj_out": "head.head",
    "scale_shift_table": "modulation",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
}  # fmt: skip
DIFFUSERS_PART = re.compile(rf"(?<![^.])({'|'.join(map(re.escape, DIFFUSERS_PARTS))})(?![^.])")
WAN_LAYER = re.compile(r"blocks\.\d+\.((self_attn|cross_attn)\.[qkvo]|ffn\.[02])")
# ending of a key in a LoRA file -> field of Addition
ENDINGS = {
    "lora_down.weight": "down", "lora_A.weight": "down", "lora_up.weight": "up", "lora_B.weight": "up", "alpha": "alpha",
    "diff": "diff", "diff_b": "diff", "diff_m": "diff",
}  # fmt: skip
# where what an ending adds goes, but for the layer's weight
PARAMETERS = {"diff_b": "bias", "diff_m": "modulation"}
# of Wan 2.1's models from images: distilled LoRAs for Wan 2.2 still have them, whose models do not
IMAGE_LAYER = re.compile(r"(?:^|.*\.)(?:k_img|v_img|norm_k_img|img_emb)(?:\..*|$)")
FILE_KEY = re.compile(rf"(?:diffusion_model\.|transformer\.)?(.+)\.({'|'.join(map(re.escape, ENDINGS))})")


def wan_name(name):
    """A module's name in diffusers as Wan and ComfyUI spell it: "blocks.0.attn1.to_q" -> "blocks.0.self_attn.q".

    Wan's own names stay, but for a block's norms, which the two number differently.
    """
    found = DIFFUSERS_PART.sub(lambda part: DIFFUSERS_PARTS[part[0]], name)
    return "head.modulation" if found == "modulation" else found


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
    """Writes the file whole or not at all. Raises TrainingError where that fails, such as on a full disk."""
    try:
        write_whole(path, write)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{path} cannot be written: {error}.") from error


@dataclass
class Addition:
    """What a LoRA adds to one weight: alpha / rank * up @ down, up @ down without an alpha, and diff.

    down: (rank, in). up: (out, rank). alpha: one number. diff: as the weight. None: the file has none.
    """

    down: Tensor | None = None
    up: Tensor | None = None
    alpha: Tensor | None = None
    diff: Tensor | None = None

    def added_to(self, weight):
        """``weight`` with it, a new tensor of its dtype; summed in float32."""
        total = weight.float()
        if self.down is not None:
            scale = 1.0 if self.alpha is None else float(self.alpha) / len(self.down)
            total = total + scale * (self.up.to(total) @ self.down.to(total))
        if self.diff is not None:
            total = total + self.diff.to(total)
        return total.to(weight.dtype)


def plain_weights(model):
    """{name: parameter} of a model as it is named without PEFT's adapters, which are left out."""
    return {n.replace(".base_layer", ""): p for n, p in model.named_parameters() if ".lora_" not in n}


def read_lora(path, weights):
    """What a LoRA file adds to a Wan model: {weight's name: Addition}, the tensors on the weights' device.

    Layers are named as Wan, ComfyUI or diffusers do, after "diffusion_model.", "transformer." or nothing. Beside the factors
    (lora_down and lora_up, or lora_A and lora_B) and alpha, distilled LoRAs hold what they add to a weight itself, ".diff", to
    a bias, ".diff_b", and to a modulation, ".diff_m". Tensors for layers that only models from images have are left out, with a
    warning, where this model has no such layer.

    Args:
        path: a safetensors file. weights: of plain_weights().

    Raises:
        ValueError: one sentence with the file and the key that is unknown, or for a layer or shape that the model has not.
    """
    read = {}
    for key, tensor in _tensors_of(path).items():
        found = FILE_KEY.fullmatch(key)
        if not found:
            raise ValueError(
                f"LoRA {path} cannot be merged: {key} ends in none of {', '.join(ENDINGS)}. Merge it with a tool that knows it "
                "and train that model, or leave it out."
            )
        if not (tensor.is_floating_point() or (found[2] == "alpha" and not tensor.is_complex())):
            raise ValueError(
                f"LoRA {path} cannot be merged: {key} must hold floating-point numbers, got {dtype_name(tensor)}, as quantised "
                "files have; take the file of 16 bits."
            )
        if not bool(torch.isfinite(tensor.float()).all()):
            raise ValueError(f"LoRA {path} cannot be merged: {key} holds NaN or infinity.")
        read[key] = found[1], found[2], tensor
    own = {in_wan: name for name, in_wan in _in_wan(weights).items()}
    layers = _in_wan({layer for layer, _, _ in read.values()})
    additions, keys, left_out = {}, {}, []
    from_images = any(map(IMAGE_LAYER.fullmatch, own))
    for key, (layer, ending, tensor) in read.items():
        if not from_images and IMAGE_LAYER.fullmatch(layers[layer]):
            left_out.append(key)
            continue
        name = own.get(f"{layers[layer]}.{PARAMETERS.get(ending, 'weight')}")
        if name is None and ending == "diff":
            name = own.get(layers[layer])  # a parameter of its own, such as a modulation
        kind, told = ENDINGS[ending], f"LoRA {path} is not this model's: {key}"
        if name is None:
            raise ValueError(
                f"{told} is for a layer that it has not; layers are named blocks.0.self_attn.q or blocks.0.attn1.to_q, after "
                '"diffusion_model.", "transformer." or nothing.'
            )
        if kind == "alpha" and tensor.numel() != 1:
            raise ValueError(
                f"LoRA {path} cannot be merged: {key} must be one number, got shape {tuple(tensor.shape)}."
            )
        if kind != "alpha" and not _fits(kind, tensor, weights[name]):
            raise ValueError(f"{told} has shape {tuple(tensor.shape)}, for a weight of {tuple(weights[name].shape)}.")
        addition = additions.setdefault(name, Addition())
        if getattr(addition, kind) is not None:
            raise ValueError(f"LoRA {path} cannot be merged: {key} is there twice, by another name.")
        setattr(addition, kind, tensor.to(weights[name].device) if kind != "alpha" else tensor)
        keys[name] = key
    for name, addition in additions.items():
        if not _whole(addition):
            raise ValueError(
                f"LoRA {path} cannot be merged: {keys[name]} has no other factor of its rank, 1 or more, beside it."
            )
    if not additions:
        raise ValueError(f"LoRA {path} changes nothing in this model: all its tensors are for layers that it has not.")
    if left_out:
        logger.warning(
            "LoRA %s: %d tensors are for image layers that this model has not, such as %s, and are left out.",
            path, len(left_out), left_out[0],
        )  # fmt: skip
    return additions


def check_lora_file(path):
    """Raises ValueError where ``path`` is no safetensors file with tensors; reads its header alone."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            empty = not file.keys()
    except (OSError, SafetensorError) as error:
        raise ValueError(f"LoRA {path} cannot be read: {error}.") from error
    if empty:
        raise ValueError(f"LoRA {path} holds no tensors.")


def _tensors_of(path):
    check_lora_file(path)
    return safetensors.torch.load_file(path)


def _in_wan(names):
    """{name: as Wan spells it} of names that are all diffusers' or all Wan's."""
    theirs = any(wan_name(name) != name for name in names if "norm" not in name)
    return {name: wan_name(name) if theirs else name for name in names}


def _fits(kind, tensor, weight):
    if kind == "diff":
        return tensor.shape == weight.shape
    side = int(kind == "down")
    return tensor.dim() == weight.dim() == 2 and tensor.shape[side] == weight.shape[side]


def _whole(addition):
    down, up = addition.down, addition.up
    if down is None or up is None:
        return down is None and up is None and addition.alpha is None
    return down.shape[0] == up.shape[1] > 0
