"""What both trainings share: optimiser, averaged weights, time budget, log."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from torch import nn

from sla2_kernels.whole_file import write_whole


class Muon(torch.optim.Optimizer):
    """Momentum whose update of each weight matrix is made orthogonal (Jordan et al., 2024), all equal shapes at once.

    Updates are scaled to a root mean square of 0.2 per element, so learning rates are those of AdamW.
    Convolution weights count as matrices (out, in * kernel).
    """

    def __init__(self, params, lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(list(params), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """closure: what torch's state dicts of optimisers hand over, None."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.flatten(1).shape, []).append(p)
            for shape, params in by_shape.items():
                grads = [p.grad for p in params]
                buffers = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                ahead = torch._foreach_lerp(grads, buffers, group["momentum"])
                update = orthogonalise(torch.stack([u.flatten(1) for u in ahead]))
                update *= -group["lr"] * 0.2 * max(shape) ** 0.5
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(
                    params, [u.view_as(p) for u, p in zip(update.to(params[0].dtype), params, strict=True)]
                )


def orthogonalise(matrix: torch.Tensor, rounds: int = 5) -> torch.Tensor:
    """Nearest orthogonal matrices to a (n, rows, cols) batch, roughly, by a quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Optimiser:
    """Muon for the matrices named, AdamW for the rest, one schedule: warm up, hold, fall linearly to zero."""

    def __init__(
        self, model: nn.Module, is_matrix, *, adam_lr: float, hold: float, muon_lr: float = 0.0, warmup: int = 100
    ):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        matrices = [p for name, p in named if is_matrix(name, p)]
        others = [p for name, p in named if not is_matrix(name, p)]
        self.parts = []
        if matrices:
            self.parts.append((Muon(matrices, lr=muon_lr), muon_lr))
        if others:
            options = {"betas": (0.9, 0.98), "weight_decay": 0.0, "fused": others[0].is_cuda}
            self.parts.append((torch.optim.AdamW(others, lr=adam_lr, **options), adam_lr))
        self.model, self.hold, self.warmup, self.steps = model, hold, warmup, 0

    def step(self, progress: float) -> float:
        """Apply the gradients at this share (0 to 1) of the budget; returns the learning-rate factor used."""
        factor = min(1.0, (self.steps + 1) / self.warmup, max(0.0, (1 - progress) / (1 - self.hold)))
        self.steps += 1
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser, lr in self.parts:
            optimiser.param_groups[0]["lr"] = lr * factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return factor


class Average:
    """Exponential moving average of a model's weights; short memory at first, so early ones do not linger."""

    def __init__(self, model: nn.Module, decay: float):
        self.source = [p.detach() for p in model.parameters()]
        self.names = [name for name, _ in model.named_parameters()]
        self.values = [p.clone() for p in self.source]
        self.decay, self.steps = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.values, self.source, 1 - decay)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(zip(self.names, self.values, strict=True))


class Budget:
    """Share of the work done: by the clock, or by a fixed number of steps when one is given (then it repeats exactly)."""

    def __init__(self, seconds: float, steps: int | None = None, start: float | None = None):
        self.start = time.monotonic() if start is None else start
        self.begin, self.seconds, self.steps = time.monotonic(), seconds, steps

    def restart(self) -> None:
        """Progress counts from now (preparation is over); the end stays where it was."""
        self.begin = time.monotonic()

    def elapsed(self) -> float:
        """Seconds since the start of the run."""
        return time.monotonic() - self.start

    def progress(self, step: int) -> float:
        """0 when the budget was made or restarted, 1 when time or steps are used up."""
        if self.steps is not None:
            return step / self.steps
        used = self.begin - self.start
        return (self.elapsed() - used) / max(self.seconds - used, 1e-6)


def options_of(args) -> dict:
    """A log's header: the options of a run; of a path its name, since the folders above it are one machine's."""
    return {key: value.name if isinstance(value, Path) else value for key, value in vars(args).items()}


class Log:
    """Prints records, keeps them, and writes them as one JSON file."""

    def __init__(self, path: Path, header: dict):
        self.path, self.data = path, {"run": header, "results": {}, "records": []}

    def record(self, **values) -> None:
        self.data["records"].append(values)
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()), flush=True)

    def result(self, **values) -> None:
        self.data["results"].update(values)
        print("RESULT", json.dumps(values), flush=True)

    def write(self) -> None:
        write_whole(self.path, lambda draft: Path(draft).write_text(json.dumps(self.data, indent=1)))


def save_weights(path: Path, state: dict[str, torch.Tensor], dtype: torch.dtype, about: str) -> None:
    """Write a state dict in 16 bit."""
    from safetensors.torch import save_file

    tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in state.items()}
    write_whole(path, lambda draft: save_file(tensors, draft, metadata={"format": "pt", "about": about}))
