"""LoRA on the transformer's blocks: trained as factors, saved as ComfyUI's stock loader takes them, merged into weights.

python -m miniature.lora --weights FOLDER --lora FILE --out FOLDER      merged weights and the VAE, for a router of that model
"""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from sla2_kernels.whole_file import write_whole

from .optim import save_weights
from .weight_files import WEIGHTS, weight_file

LAYER = re.compile(r"blocks\.\d+\.((self|cross)_attn\.[qkvo]|ffn\.[02])")
PREFIX = "diffusion_model."


class LoRALinear(nn.Linear):
    """A linear layer whose weight is W + lora_up @ lora_down; W and the bias are those of `linear` and stay as they are.

    lora_down (rank, in) begins random, lora_up (out, rank) as zeros: at first the layer computes what `linear` does.
    """

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        down = torch.randn(rank, linear.in_features, generator=generator) / linear.in_features**0.5
        device = linear.weight.device
        self.lora_down = nn.Parameter(down.to(device))
        self.lora_up = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight + self.lora_up @ self.lora_down, self.bias)


def add_lora(model: nn.Module, rank: int, seed: int = 0) -> nn.Module:
    """Freeze the model and give the matrices of its attention and feed-forward layers a LoRA; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if LAYER.fullmatch(name):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, LoRALinear(module, rank, generator))
    return model


def lora_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The LoRA in the state dict of a model of add_lora(), named as in its file: diffusion_model.LAYER.lora_up.weight."""
    return {f"{PREFIX}{key}.weight": value for key, value in state.items() if ".lora_" in key}


@torch.no_grad()
def set_lora(model: nn.Module, lora: dict[str, torch.Tensor]) -> None:
    """Give a model of add_lora() the factors of load_lora().

    Raises:
        ValueError: the LoRA has other layers or another rank.
    """
    for key, value in lora_of(model.state_dict()).items():
        if key not in lora or lora[key].shape != value.shape:
            raise ValueError(
                f"the LoRA has no {key} of shape {tuple(value.shape)}: ask for the rank that it was trained with"
            )
        value.copy_(lora[key])


def save_lora(path: Path, lora: dict[str, torch.Tensor], dtype: torch.dtype, about: str) -> None:
    """Write what lora_of() returns; alpha is the rank, so that strength 1 adds lora_up @ lora_down."""
    tensors = {key: value.detach().to("cpu", dtype).contiguous() for key, value in lora.items()}
    for key, value in lora.items():
        if key.endswith(".lora_down.weight"):
            tensors[key.replace("lora_down.weight", "alpha")] = torch.tensor(float(value.shape[0]))
    write_whole(path, lambda draft: save_file(tensors, draft, metadata={"format": "pt", "about": about}))


def load_lora(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA file in float32.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a LoRA in the format of save_lora().
    """
    if not path.is_file():
        raise FileNotFoundError(f"no LoRA at {path}: give a file that miniature.distil wrote")
    lora = {key: value.float() for key, value in load_file(path).items()}
    if not lora or not all(key.startswith(PREFIX) for key in lora):
        raise ValueError(
            f"{path} is not a LoRA of {PREFIX}LAYER.lora_up.weight tensors: give one that miniature.distil wrote"
        )
    return lora


@torch.no_grad()
def merge_lora(state: dict[str, torch.Tensor], lora: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A transformer's state dict with the LoRA added to its weights.

    Raises:
        ValueError: the LoRA is for a transformer of other layers.
    """
    merged = dict(state)
    for key, down in lora.items():
        if not key.endswith(".lora_down.weight"):
            continue
        layer = key.removesuffix(".lora_down.weight")
        up, name = lora[f"{layer}.lora_up.weight"], layer.removeprefix(PREFIX) + ".weight"
        if name not in state or state[name].shape != (up.shape[0], down.shape[1]):
            raise ValueError(
                f"the LoRA changes {name} ({up.shape[0]}, {down.shape[1]}), which these weights do not have: "
                "give the weights that it was trained on"
            )
        scale = float(lora.get(f"{layer}.alpha", down.shape[0])) / down.shape[0]
        merged[name] = state[name] + scale * (up.to(state[name]) @ down.to(state[name]))
    return merged


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of the transformer and VAE files")
    parser.add_argument("--lora", type=Path, required=True)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the merged transformer and a copy of the VAE"
    )
    args = parser.parse_args(argv)
    dit, vae = "wan_miniature_dit.safetensors", "wan_miniature_vae.safetensors"
    state = {key: value.float() for key, value in load_file(weight_file(dit, args.weights)).items()}
    merged = merge_lora(state, load_lora(args.lora))
    args.out.mkdir(parents=True, exist_ok=True)
    save_weights(
        args.out / dit, merged, torch.bfloat16, f"the miniature's transformer with {args.lora.name} merged into it"
    )
    shutil.copyfile(weight_file(vae, args.weights), args.out / vae)
    print(f"{args.out}: {dit} with {args.lora.name}, {vae}")


if __name__ == "__main__":
    main()
