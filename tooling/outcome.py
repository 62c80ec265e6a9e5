"""What a demo run found, and the table that it prints."""

import json
from dataclasses import asdict, dataclass, field

from . import comparison
from .demo_plan import CAPTION


@dataclass
class Run:
    """One of the two videos. Seconds are wall-clock; calls are of self-attention, None where nothing counted them."""

    name: str
    video: str
    sampling_s: float
    decoding_s: float
    sparse_calls: int | None = None
    dense_calls: int | None = None
    sparsity: float | None = None
    reasons: dict = field(default_factory=dict)
    notes: list = field(default_factory=list)


@dataclass
class Outcome:
    """Both runs; latent_difference is |sla2 - dense| / |dense| over all values."""

    host: str
    device: str
    tokens: int
    steps: int
    seed: int
    trained: bool
    runs: list
    latent_difference: float


def skips(sparsity):
    return "-" if sparsity is None else f"skips {100 * sparsity:.1f}%, keeps {100 - 100 * sparsity:.1f}%"


def table(outcome):
    """The outcome as text."""
    head = ("", "attention calls", "achieved sparsity", "sampling", "VAE decoding", "video")
    rows = [head]
    for run in outcome.runs:
        calls = "not patched" if run.sparse_calls is None else f"{run.sparse_calls} sparse, {run.dense_calls} dense"
        rows.append(
            (run.name, calls, skips(run.sparsity), f"{run.sampling_s:.1f} s", f"{run.decoding_s:.1f} s", run.video)
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    for run in outcome.runs:
        lines += [f"{run.name}: {count} dense: {reason}" for reason, count in run.reasons.items()]
        lines += [f"{run.name}: {note}" for note in run.notes]
    weights = "the trained miniature" if outcome.trained else "untrained random weights, so the videos show noise"
    lines += [
        "",
        f"{outcome.host} on {outcome.device}; {outcome.tokens} tokens, {outcome.steps} steps, seed {outcome.seed}.",
        f'"{CAPTION}"; {weights}.',
        f"Latent difference |SLA2 - dense| / |dense|: {outcome.latent_difference:.3f}",
    ]
    if outcome.host == "ComfyUI":
        lines.append("The sampling that ran first includes loading the model.")
    if outcome.device == "cpu":
        lines.append("These times are not the speed-up: on a CPU nothing is made faster.")
    else:
        lines.append("These times are not the speed-up: the miniature is too small for it; see benchmarks/results.")
    return "\n".join(lines)


def write(outcome, folder):
    """Writes results.txt, results.json and the picture of both videos to ``folder``; returns the text."""
    comparison.write(folder, [run.video for run in outcome.runs])
    text = table(outcome)
    (folder / "results.txt").write_text(text + "\n", encoding="utf-8")
    (folder / "results.json").write_text(json.dumps(asdict(outcome), indent=1), encoding="utf-8")
    return text
