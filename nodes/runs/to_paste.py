"""One line with all that was measured in a run, for an issue or a forum: the card, the model, times, error, memory."""

import importlib.util

import torch

from ...sla2_kernels.support import triton_version
from .time_saved import mean_milliseconds

GIB = 2**30


def line_to_paste(run, data, model, device):
    """The line, of report_data(). model: class name of the diffusion model. device: torch.device that it ran on.

    Only what was measured is in it: no dense call timed, no dense time.
    """
    times = {name: mean_milliseconds(data["layers"], kind) for name, kind in (("dense", "dense"), ("SLA2", "sparse"))}
    return joined(
        card(device),
        model,
        f"{run.shortest} tokens" if run.shortest else None,
        f"{data['sparse_calls']} of {data['sparse_calls'] + data['dense_calls']} calls sparse",
        None if run.sparsity is None else f"{100 * run.sparsity:.1f}% skipped in {', '.join(data['bit_widths'])}",
        ", ".join(f"{name} {value:.2f} ms" for name, value in times.items() if value is not None) or None,
        None if data["attention_error"] is None else f"attention error {data['attention_error']:.3f}",
        f"{run.ended - run.started:.1f} s in {run.model_calls} model calls",
        peak_memory(device),
        versions(),
    )


def joined(*parts):
    """One line of words, None where something was not measured."""
    return "to paste: " + " | ".join(part for part in parts if part)


def card(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory(device):
    """Since ComfyUI started: words, or None off CUDA."""
    return f"peak memory {torch.cuda.max_memory_allocated(device) / GIB:.1f} GiB" if device.type == "cuda" else None


def versions():
    triton = ".".join(map(str, triton_version())) if importlib.util.find_spec("triton") else "none"
    return f"torch {torch.__version__}, triton {triton}"
