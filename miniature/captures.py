"""Q, K, V of a model's self-attention calls, in memory or in a safetensors file."""

from dataclasses import dataclass, replace

import safetensors
import safetensors.torch
import torch.nn.functional as F
from torch import Tensor

FILES = "train.safetensors", "held_out.safetensors"  # of a folder of captures


@dataclass(frozen=True)
class Capture:
    """One call: q, k, v (B, H, N, D) after norm and rotation, tokens in (t, h, w) raster order of ``grid``."""

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    grid: tuple[int, int, int]

    def heads(self, index):
        """The capture with some heads only."""
        return replace(self, q=self.q[:, index], k=self.k[:, index], v=self.v[:, index])

    def permuted(self, order):
        """The capture with its tokens in another order, int64 (N,)."""
        return replace(self, q=self.q[:, :, order], k=self.k[:, :, order], v=self.v[:, :, order])


class Recorder:
    """An attention function (layer, q, k, v) -> out on (B, N, H, D) tensors that keeps what it sees and runs dense.

    grid: (t, h, w). every: keep each ``every``-th call of a layer. dtype, device: of what is kept (None: as it comes).
    """

    def __init__(self, grid, *, every=1, dtype=None, device=None):
        self.grid, self.every, self.dtype, self.device = grid, every, dtype, device
        self.calls = {}
        self.captures = []

    def __call__(self, layer, q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        call = self.calls.get(layer, 0)
        self.calls[layer] = call + 1
        if call % self.every == 0:
            kept = [x.detach().to(dtype=self.dtype, device=self.device, copy=True) for x in (q, k, v)]
            self.captures.append(Capture(layer, *kept, self.grid))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def save_captures(path, captures):
    """Writes captures of one grid to a safetensors file."""
    tensors = {
        f"{number}.{capture.layer}.{name}": getattr(capture, name).contiguous()
        for number, capture in enumerate(captures)
        for name in "qkv"
    }
    grid = ",".join(map(str, captures[0].grid))
    safetensors.torch.save_file(tensors, path, metadata={"grid": grid})


def load_captures(path, device="cpu"):
    """Captures of a file written by save_captures, in their order."""
    with safetensors.safe_open(path, "pt", device=str(device)) as file:
        grid = tuple(int(n) for n in file.metadata()["grid"].split(","))
        keys = sorted({tuple(map(int, name.split(".")[:2])) for name in file.keys()})  # noqa: SIM118
        return [
            Capture(layer, *(file.get_tensor(f"{number}.{layer}.{name}") for name in "qkv"), grid)
            for number, layer in keys
        ]


def model_shape(captures):
    """(number of layers, heads, head_dim) of the model that the captures came from."""
    return 1 + max(c.layer for c in captures), captures[0].q.shape[1], captures[0].q.shape[3]


def by_layer(captures):
    layers = {}
    for capture in captures:
        layers.setdefault(capture.layer, []).append(capture)
    return layers
