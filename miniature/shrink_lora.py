"""A LoRA file of fewer bytes: the least singular values of all its layers together are left out.

    python -m miniature.shrink_lora lora.safetensors --out smaller.safetensors --megabytes 13.7

A layer keeps as many as count there, at least one; what it adds changes by rounding to 16 bit and by what is left out, which is
said.
"""

import argparse
import sys
from pathlib import Path

import torch
from safetensors import safe_open

from .lora import load_lora, save_lora


def shrink(lora: dict[str, torch.Tensor], size: float) -> tuple[dict[str, torch.Tensor], float]:
    """(factors, share left out): LAYER.lora_up.weight (out, rank) and LAYER.lora_down.weight (rank, in) of ``size`` bytes in 16 bit.

    lora: the same factors, at strength 1 with an alpha that is the rank. The share is that of the root mean square of all that
    the layers add.

    Raises:
        ValueError: so few bytes leave a layer without any.
    """
    layers = sorted(key.removesuffix(".lora_up.weight") for key in lora if key.endswith(".lora_up.weight"))
    found = {layer: _singular(lora[f"{layer}.lora_up.weight"], lora[f"{layer}.lora_down.weight"]) for layer in layers}
    # (square of the value per byte, layer); the first of a layer, its largest, stays
    values = sorted(
        (value.item() ** 2 / _bytes(found[layer]), layer) for layer in layers for value in found[layer][1][1:]
    )
    kept = {layer: len(found[layer][1]) for layer in layers}
    total, left_out = sum(kept[layer] * _bytes(found[layer]) for layer in layers), 0.0
    for worth, layer in values:
        if total <= size:
            break
        kept[layer] -= 1
        total -= _bytes(found[layer])
        left_out += worth * _bytes(found[layer])
    if total > size:
        raise ValueError(f"{size / 1e6:g} MB hold no value of each layer, which takes {total / 1e6:.2f} MB.")
    factors = {}
    for layer, (up, value, down) in found.items():
        root = value[: kept[layer]].sqrt()
        factors[f"{layer}.lora_up.weight"] = up[:, : kept[layer]] * root
        factors[f"{layer}.lora_down.weight"] = root[:, None] * down[: kept[layer]]
    return factors, (left_out / sum(value.square().sum().item() for _, value, _ in found.values())) ** 0.5


def _singular(up, down):
    """Singular value decomposition of up @ down in float64, of their rank."""
    q_up, r_up = torch.linalg.qr(up.double())
    q_down, r_down = torch.linalg.qr(down.double().T)
    u, value, v = torch.linalg.svd(r_up @ r_down.T)
    return q_up @ u, value, v @ q_down.T


def _bytes(parts):
    """What one singular value of a layer takes in 16 bit."""
    up, _, down = parts
    return 2 * (up.shape[0] + down.shape[1])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lora", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--megabytes", type=float, required=True, help="of its tensors, in 10^6 bytes")
    args = parser.parse_args(argv)
    lora = load_lora(args.lora)
    for key, down in lora.items():
        if key.endswith(".lora_down.weight") and lora[key.replace("lora_down.weight", "alpha")] != len(down):
            parser.error(f"{args.lora}: {key} has another alpha than its rank")
    factors, share = shrink(lora, 1e6 * args.megabytes)
    with safe_open(args.lora, "pt") as file:
        about = (file.metadata() or {}).get("about", "")
    save_lora(args.out, factors, torch.bfloat16, about)
    ranks = [len(factor) for key, factor in factors.items() if key.endswith(".lora_down.weight")]
    print(f"{args.out.stat().st_size / 1e6:.2f} MB, ranks {min(ranks)} to {max(ranks)}, {100 * share:.2g}% left out")


if __name__ == "__main__":
    sys.exit(main())
