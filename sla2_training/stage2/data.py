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


def dtype_name(tensor):
    return str(tensor.dtype).removeprefix("torch.")


def check_tensor(where, name, tensor, dims):
    """Raises ValueError unless the tensor, None where the file ``where`` has none, holds finite numbers in ``dims`` dimensions."""
    if tensor is None or tensor.dim() != dims or tensor.numel() == 0:
        got = "nothing" if tensor is None else tuple(tensor.shape)
        raise ValueError(f"{where} must hold {name!r} with {dims} dimensions, got {got}.")
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        raise ValueError(f"{where}: {name!r} must be float32, bfloat16 or float16, got {dtype_name(tensor)}.")
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{where}: {name!r} holds NaN or infinity.")


def check_empty(where, empty, context):
    """Raises ValueError unless ``empty`` is one row like those of ``context``."""
    check_tensor(where, "empty_context", empty, 3)
    if empty.shape != (1, *context.shape[1:]):
        raise ValueError(
            f"{where}: 'empty_context' must be one row as long as those of 'context', {(1, *context.shape[1:])}, "
            f"got {tuple(empty.shape)}."
        )


def load_latents(path):
    """VideoLatents of a safetensors file: "latents" (N, C, T, h, w) and "context" (N, L, D) or, with "caption" (N,) int64,
    (K, L, D); "empty_context" (1, L, D) for training without captions. Raises ValueError: one sentence with the file."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            names = set(file.keys())
            tensors = {n: file.get_tensor(n) for n in ("latents", "context", "caption", "empty_context") if n in names}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"Training data {path} cannot be read: {error}.") from error
    where = f"Training data {path}"
    check_tensor(where, "latents", tensors.get("latents"), 5)
    check_tensor(where, "context", tensors.get("context"), 3)
    if "empty_context" in tensors:
        check_empty(where, tensors["empty_context"], tensors["context"])
    count = len(tensors["latents"])
    caption = tensors.get("caption", torch.arange(count))
    if caption.is_floating_point() or caption.is_complex():
        raise ValueError(f"{where}: 'caption' must hold integers, got {dtype_name(caption)}.")
    caption = caption.long()
    if caption.shape != (count,) or int(caption.min()) < 0 or int(caption.max()) >= len(tensors["context"]):
        raise ValueError(f"{where}: {count} videos need one row of 'context' each ({len(tensors['context'])} rows).")
    return VideoLatents(tensors["latents"], tensors["context"], caption, tensors.get("empty_context"))
