"""A deeper transformer that computes what a trained one does: blocks that add nothing yet, between the old ones."""

from __future__ import annotations

import torch

SILENT = ("self_attn.o.", "cross_attn.o.", "ffn.2.")  # what a block adds goes through these


def grow(state: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """A state dict of `layers` blocks: the old ones, evenly spread, each new one a copy of the block before it whose
    outputs are zero.

    Raises:
        ValueError: the state has more blocks than that.
    """
    old = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    if layers < old:
        raise ValueError(f"the transformer has {old} layers, it cannot grow to {layers}: ask for at least {old}")
    source = [layer * old // layers for layer in range(layers)]
    out = {key: value for key, value in state.items() if not key.startswith("blocks.")}
    for layer, origin in enumerate(source):
        new = layer > 0 and origin == source[layer - 1]
        prefix = f"blocks.{origin}."
        for key, value in state.items():
            if key.startswith(prefix):
                name = key.removeprefix(prefix)
                out[f"blocks.{layer}.{name}"] = (
                    torch.zeros_like(value) if new and name.startswith(SILENT) else value.clone()
                )
    return out
