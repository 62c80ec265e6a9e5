"""Dense against SLA2: what was measured, what follows from it, and how it is said."""

import statistics
import time
from dataclasses import dataclass

import torch

MOST_CEILING = 100  # above it only measuring errors speak


class StepClock:
    """A sampler's callback that notes when each step ended; the device is waited for. The first step, a warm-up, is left out."""

    def __init__(self, device, after_step):
        self.device, self.after_step, self.ends = device, after_step, []

    def __call__(self, *_):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.ends.append(time.perf_counter())
        self.after_step()

    def seconds(self):
        """Median seconds per step. Raises ValueError below two steps."""
        if len(self.ends) < 2:
            raise ValueError("SLA2 Compare: the sampler made fewer than two steps, and the first one only warms up.")
        return statistics.median(b - a for a, b in zip(self.ends, self.ends[1:], strict=False))


@dataclass(frozen=True)
class Measured:
    """One sampling. latent: on the CPU. attention_s: seconds per step in self-attention. peak: bytes, None off CUDA."""

    latent: torch.Tensor
    step_s: float
    attention_s: float
    sparse_calls: int
    dense_calls: int
    peak: int | None


def attention_seconds(run, steps):
    """Seconds per step that the self-attention calls of a closed RunRecord took."""
    total = 0.0
    for record in run.layers.values():
        total += record.sparse * record.milliseconds.get("sparse", 0.0)
        total += record.dense.total() * record.milliseconds.get("dense", 0.0)
    return total / 1000 / steps


def relative_error(latent, reference):
    """|latent - reference| / |reference|, in float64."""
    reference = reference.double()
    norm = reference.norm()
    return ((latent.double() - reference).norm() / norm).item() if norm else float("nan")


def amdahl_ceiling(share):
    """Speed-up of a step if ``share`` of it cost nothing; None where that is beyond all measuring."""
    return 1 / (1 - share) if share < 1 - 1 / MOST_CEILING else None


def comparison_data(dense, sla2, device_name, setting, found):
    """{"headline", "rows": [[name, value], ...], "break_even": tokens or None} for the page.

    dense, sla2: Measured. setting: words such as "skips 90%, keeps 10%". found: (break-even tokens or None, longest length
    tried), or None where it was not looked for.
    """
    faster = dense.step_s / sla2.step_s
    share = min(1.0, dense.attention_s / dense.step_s)
    ceiling = amdahl_ceiling(share)
    attention = dense.attention_s / sla2.attention_s if sla2.attention_s else float("nan")
    calls = sla2.sparse_calls + sla2.dense_calls
    rows = [
        ["seconds per step, dense", f"{dense.step_s:.3f}"],
        ["seconds per step, SLA2", f"{sla2.step_s:.3f} ({sla2.sparse_calls} of {calls} calls accelerated)"],
        ["self-attention alone", f"{attention:.2f}x as fast"],
        ["attention's share of a dense step", f"{100 * share:.0f}%"],
        ["ceiling (Amdahl's law)", f"{ceiling:.2f}x" if ceiling else f"above {MOST_CEILING}x"],
        ["latent error, relative to dense", f"{relative_error(sla2.latent, dense.latent):.4f}"],
        ["peak memory, dense and SLA2", _memory(dense.peak, sla2.peak)],
    ]
    tokens = None
    if found is not None:
        tokens, longest = found
        said = f"{tokens} tokens" if tokens else f"none up to {longest} tokens: SLA2 was slower"
        rows.append([f"break-even on {device_name}", said])
    word = f"{faster:.2f}x faster" if faster >= 1 else f"{1 / faster:.2f}x slower"
    return {"headline": f"SLA2 ({setting}) is {word} per step than dense", "rows": rows, "break_even": tokens}


def _memory(dense, sla2):
    if dense is None or sla2 is None:
        return "measured on CUDA only"
    return f"{dense / 2**30:.2f} and {sla2 / 2**30:.2f} GiB"


def comparison_text(data):
    return "\n".join([data["headline"], *(f"{name}: {value}" for name, value in data["rows"])])
