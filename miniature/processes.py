"""The processes of one training, one per GPU: started by torchrun they share its batches, started alone there is one."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import nn


class Processes:
    """rank: this process's number; count: how many there are. Alone, every method leaves things as they are."""

    def __init__(self, device: torch.device):
        """`device` without an index becomes this process's GPU, as torchrun's LOCAL_RANK has it."""
        self.count, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.device = device
        if self.count > 1:
            if device.type == "cuda" and device.index is None:
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(self.device)
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def share(self, batch: int) -> int:
        """This process's part of a batch; not 1 of several, which torch.compile would compile for apart."""
        return max(min(batch, 2), batch // self.count)

    def agree(self, value: float) -> float:
        """The first process's number, in all of them: clocks differ, and what follows from them must not."""
        if self.count == 1:
            return value
        agreed = torch.tensor(value, dtype=torch.float64)  # on the CPU: the GPU's queue is not waited for
        dist.broadcast(agreed, 0)
        return float(agreed)

    @torch.no_grad()
    def average_gradients(self, model: nn.Module) -> None:
        """Every process's gradients become their mean."""
        if self.count == 1:
            return
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.count
        parts = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(parts, gradients, strict=True)])

    def close(self) -> None:
        if self.count > 1:
            dist.barrier()
            dist.destroy_process_group()
