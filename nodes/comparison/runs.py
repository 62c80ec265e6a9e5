"""Dense against SLA2: what was measured, what follows from it, and how it is said."""

import math
import statistics
import time
from dataclasses import dataclass

import torch

from ..runs.advice import attention_milliseconds
from ..runs.to_paste import joined

MAX_CEILING = 100  # above it only measuring errors speak
NOT_MEASURED = "not measured"


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
    """One sampling. latent: on the CPU, of several parts where the model makes sound too. attention_s: seconds per step in self-attention. peak: bytes, None off CUDA.

    skipped: share of the token pairs that the sparse calls skipped, None where there were none. error_words: what the run
    says of its attention error, None where it measured none.
    """

    latent: torch.Tensor
    step_s: float
    attention_s: float
    sparse_calls: int
    dense_calls: int
    peak: int | None
    skipped: float | None = None
    error_words: str | None = None

    @property
    def calls(self):
        return self.sparse_calls + self.dense_calls


def attention_seconds(run, steps):
    """Seconds per step that the self-attention calls of a closed RunRecord took."""
    return (attention_milliseconds(run) or 0.0) / 1000 / steps


def parts_of(latent):
    """Tensors of a latent: the video, and behind it the sound where the model makes both."""
    return latent.unbind() if latent.is_nested else (latent,)


def relative_error(latent, reference):
    """|latent - reference| / |reference| in float64 over all parts, as text."""
    latent, reference = (torch.cat([part.double().flatten() for part in parts_of(one)]) for one in (latent, reference))
    norm = reference.norm()
    if not norm:
        return f"{NOT_MEASURED}: the dense latent is zero"
    error = ((latent - reference).norm() / norm).item()
    return f"{error:.4f}" if math.isfinite(error) else f"{NOT_MEASURED}: a latent holds NaN or infinity"


def amdahl_ceiling(share):
    """Speed-up of a step if ``share`` of it cost nothing; None where that is beyond all measuring."""
    return 1 / (1 - share) if share < 1 - 1 / MAX_CEILING else None


def comparison_data(dense, sla2, device_name, setting, found, rival=None):
    """{"headline", "rows": [[name, value], ...], "break_even": tokens or None} for the page.

    dense, sla2: Measured. setting: words such as "skips 90%, keeps 10%". found: (break-even tokens or None, longest length
    tried), or None where it was not looked for. rival: Rival, or None where this ComfyUI has no sparse attention of its own.
    """
    if sla2.sparse_calls:
        headline, rows = _speed(dense, sla2, setting), _speed_rows(dense, sla2)
    else:
        headline, rows = _nothing_ran(sla2.calls), []
    if rival is not None and sla2.sparse_calls:
        rows += rival.rows(dense, sla2, device_name)
    tokens = None
    if found is not None:
        tokens, longest = found
        said = f"{tokens} tokens" if tokens else f"none up to {longest} tokens: SLA2 was slower"
        rows.append([f"break-even on {device_name}", said])
    return {"headline": headline, "rows": rows, "break_even": tokens}


def _nothing_ran(calls):
    if calls:
        return f"Nothing to compare: none of {calls} self-attention calls ran sparse; SLA2 Apply Attention says why"
    return "Nothing to compare: no self-attention call reached SLA2; SLA2 Report names what else is on this MODEL"


def _speed(dense, sla2, setting):
    faster = dense.step_s / sla2.step_s
    word = f"{faster:.2f}x faster" if faster >= 1 else f"{1 / faster:.2f}x slower"
    return f"SLA2 ({setting}) is {word} per step than dense"


def _speed_rows(dense, sla2):
    alone = share = ceiling = NOT_MEASURED
    if dense.attention_s:
        spent = min(1.0, dense.attention_s / dense.step_s)
        highest = amdahl_ceiling(spent)
        share = f"{100 * spent:.0f}%"
        ceiling = f"{highest:.2f}x" if highest else f"above {MAX_CEILING}x"
        if sla2.attention_s:
            alone = f"{dense.attention_s / sla2.attention_s:.2f}x as fast"
    return [
        ["seconds per step, dense", f"{dense.step_s:.3f}"],
        ["seconds per step, SLA2", f"{sla2.step_s:.3f} ({sla2.sparse_calls} of {sla2.calls} calls accelerated)"],
        ["self-attention alone", alone],
        ["attention's share of a dense step", share],
        ["ceiling (Amdahl's law)", ceiling],
        ["latent error, relative to dense", relative_error(sla2.latent, dense.latent)],
        ["attention error per call", sla2.error_words or NOT_MEASURED],
        ["peak memory, dense and SLA2", _memory(dense.peak, sla2.peak)],
    ]


def _memory(dense, sla2):
    if dense is None or sla2 is None:
        return "measured on CUDA only"
    return f"{dense / 2**30:.2f} and {sla2 / 2**30:.2f} GiB"


def line_to_paste(card, model, dense, sla2, rival, versions):
    """One line with what was measured. model: class name. rival: Rival or None. versions: words."""
    beside = [
        ("dense", dense),
        *([("ComfyUI's own", rival.measured)] if rival and rival.measured else []),
        ("SLA2", sla2),
    ]
    if not sla2.sparse_calls:
        return joined(card, model, f"none of {sla2.calls} self-attention calls ran sparse", versions)
    steps = ", ".join(f"{name} {one.step_s:.3f}" for name, one in beside)
    parts = [card, model, f"seconds per step: {steps}", f"latent error {relative_error(sla2.latent, dense.latent)}"]
    parts += [f"peak memory {_memory(dense.peak, sla2.peak)}", sla2.error_words, versions]
    return joined(*parts)


def comparison_text(data):
    return "\n".join([data["headline"], *(f"{name}: {value}" for name, value in data["rows"])])
