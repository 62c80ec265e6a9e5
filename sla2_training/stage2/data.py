"""What stage 2 trains on: latents of videos with their text conditioning. The dense model's own samples do as well."""

from dataclasses import dataclass

import safetensors
import torch
from safetensors import SafetensorError
from torch import Tensor


@dataclass(frozen=True)
class VideoLatents:
    """latents: (N, C, T, h, w), normalised as the model takes them. context: (K, L, D). caption: int64 (N,), the row of
    context that belongs to each video. empty: (1, L, D), the conditioning of no caption, or None."""

    latents: Tensor
    context: Tensor
    caption: Tensor
    empty: Tensor | None = None

    def __len__(self):
        return len(self.latents)

    def batch(self, indices, dropped, device):
        """(latents float32, context) of some videos; ``dropped``: bool per video, those take the empty caption."""
        rows = self.context[self.caption[indices].to(self.context.device)]
        if self.empty is not None:
            rows = torch.where(dropped[:, None, None].to(rows.device), self.empty.to(rows), rows)
        return self.latents[indices.to(self.latents.device)].to(device).float(), rows.to(device)


def load_latents(path):
    """VideoLatents of a safetensors file: "latents" (N, C, T, h, w) and "context" (N, L, D) or, with "caption" (N,) int64,
    (K, L, D); "empty_context" (1, L, D) for training without captions. Raises ValueError: one sentence with the file."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            names = set(file.keys())
            tensors = {n: file.get_tensor(n) for n in ("latents", "context", "caption", "empty_context") if n in names}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"Training data {path} cannot be read: {error}.") from error
    for name, dims in (("latents", 5), ("context", 3)):
        if name not in tensors or tensors[name].dim() != dims or len(tensors[name]) == 0:
            got = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise ValueError(f"Training data {path} must hold {name!r} with {dims} dimensions, got {got}.")
        if not bool(torch.isfinite(tensors[name]).all()):
            raise ValueError(f"Training data {path}: {name!r} holds NaN or infinity.")
    count = len(tensors["latents"])
    caption = tensors.get("caption", torch.arange(count))
    if caption.shape != (count,) or int(caption.min()) < 0 or int(caption.max()) >= len(tensors["context"]):
        raise ValueError(
            f"Training data {path}: {count} videos need one row of 'context' each ({len(tensors['context'])} rows)."
        )
    return VideoLatents(tensors["latents"], tensors["context"], caption.long(), tensors.get("empty_context"))
