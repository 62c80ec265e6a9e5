"""The miniature Wan2.1 checkpoint that the demo generates with: the trained one, or seeded random weights."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from miniature.vae import WanVAE
from miniature.wan import WanConfig, WanModel
from miniature.weight_files import WEIGHTS as TRAINED
from miniature.weight_files import weight_file

DIT, VAE, ROUTER, LORA, LORA_ROUTER = (
    f"wan_miniature_{part}.safetensors" for part in ("dit", "vae", "router", "stage2_lora", "stage2_router")
)


@dataclass(frozen=True)
class Checkpoint:
    """Files of the transformer and the VAE; router (stage 1), and lora with its lora_router (stage 2), where they are trained."""

    dit: Path
    vae: Path
    router: Path | None
    trained: bool
    lora: Path | None = None
    lora_router: Path | None = None


def find_or_make(folder, trained=TRAINED):
    """The trained miniature, else random weights written to ``folder`` (once)."""
    found = {name: weight_file(name, trained) for name in (DIT, VAE, ROUTER, LORA, LORA_ROUTER)}
    if found[DIT].exists() and found[VAE].exists():
        router, lora, lora_router = (
            path if path.exists() else None for path in (found[ROUTER], found[LORA], found[LORA_ROUTER])
        )
        return Checkpoint(found[DIT], found[VAE], router, True, lora, lora_router)
    folder.mkdir(parents=True, exist_ok=True)
    dit, vae = folder / DIT, folder / VAE
    if not dit.exists():
        _save(WanModel(WanConfig(ffn_dim=512, num_layers=3)), dit, torch.bfloat16)
    if not vae.exists():
        _save(WanVAE(8), vae, torch.float32)
    return Checkpoint(dit, vae, None, False)


def _save(model, path, dtype):
    temporary = path.with_suffix(".tmp")
    save_file({name: tensor.to(dtype) for name, tensor in random_weights(model).items()}, temporary)
    temporary.replace(path)


def random_weights(model, seed=0):
    """A state dict for ``model``, float32: N(0, 1 / fan_in), norms 1, biases 0. Activations stay of order 1."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in sorted(model.state_dict().items()):
        if name.endswith("bias"):
            state[name] = torch.zeros(tensor.shape)
        elif name.endswith("gamma") or "norm" in name:
            state[name] = torch.ones(tensor.shape)
        else:
            fan_in = tensor.shape[-1] if "modulation" in name else tensor[0].numel()
            state[name] = torch.randn(tensor.shape, generator=generator) * fan_in**-0.5
    return state
