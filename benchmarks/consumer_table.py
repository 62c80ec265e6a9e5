"""The table of benchmarks.consumer's results: another card's instructions, timed on an H100 or H200."""

from .consumer_imitation import CARDS
from .consumer_roofline import SHEETS

SETTINGS = (("sla2", "fitted"), ("sla2", "a ratio per head"), ("sol_attn", "equal share"), ("sol_attn", "tau 1.3"))
TIMES = "fitted"  # the setting whose times are compared with sol_attn's
TRAFFIC = "traffic"  # the part of benchmarks.memory_traffic


def consumer_markdown(content):
    """GPU time per call in ms per architecture, method, shape and sparsity; raises ValueError where nothing was measured."""
    rows = [row for row in content["rows"] if row["part"].startswith("sm_")]
    if not rows:
        raise ValueError(
            "the results hold no row of another card's instructions: measure (python -m benchmarks.consumer)."
        )
    columns = list(dict.fromkeys((row["shape"], row["sparsity"]) for row in rows if row["sparsity"] is not None))
    heads = [f"{shape}, {100 * sparsity:g}%" for shape, sparsity in columns]
    lines = ["| instructions of | method | " + " | ".join(heads) + " |", "|---|---|" + "---|" * len(columns)]
    for part in dict.fromkeys(row["part"] for row in rows):
        of_part = [row for row in rows if row["part"] == part]
        for method, setting in SETTINGS:
            found = [row for row in of_part if (row["method"], row["setting"]) == (method, setting)]
            if found:
                cells = " | ".join(_cell(found, of_part, *column) for column in columns)
                lines.append(f"| {part} | {_label(method, setting)} | {cells} |")
    return "\n".join([*lines, "", *_notes(content, rows)])


def _label(method, setting):
    return f"**SLA2**, int8, {setting}" if method == "sla2" else f"{method}, {setting}"


def _at(rows, shape, sparsity):
    return next((row for row in rows if row["shape"] == shape and row["sparsity"] in (sparsity, None)), None)


def _cell(found, of_part, shape, sparsity):
    row = _at(found, shape, sparsity)
    if row is None:
        return "-"
    mark = "*" if row["other_instructions"] else ""
    if not row.get("passed", True):
        return "wrong"
    rivals = [other for other in of_part if other["method"] == "sol_attn" and other["setting"] == "equal share"]
    rival = _at(rivals, shape, sparsity)
    times = f" ({rival['ms'] / row['ms']:.2f}x)" if row["setting"] == TIMES and rival else ""
    return f"{row['ms']:.2f}{mark}{times}"


def _notes(content, rows):
    env = content["environment"]
    versions = ", ".join(f"{name} {env[name]}" for name in ("torch", "triton", "driver") if env.get(name))
    lines = [
        f"Another card's instructions, timed on one {env['card']} ({versions}): Triton's PTX for sm_80 (A100), sm_86 (RTX 30) or "
        "sm_89 (RTX 40, L40), assembled for this card, no more programs at a time than there. GPU time of the whole call in ms, by "
        "CUDA graph. No RTX card was timed. In brackets: times faster than sol_attn with as many key blocks in all, its own block and "
        "neighbours counted. Fitted: one call in eight fits the ratio (the node: every call in runs of at most 8 steps, every fourth in longer ones)."
    ]
    ours = [row for row in rows if row["method"] == "sla2"]
    if ours:
        most = max(ours, key=lambda row: row["host_ms"])
        launches = [row["launches"] for row in ours]
        errors = [row["relative_error"] for row in ours if "relative_error" in row]
        lines.append(
            f"A call of SLA2 takes {min(launches)} to {max(launches)} launches, the host at most {most['host_ms']:.2f} ms; its error against float64 on Gaussian inputs is at most {max(errors):.3f}."
        )
    absent = [
        f"sm_{arch} ({CARDS[arch].models})"
        for arch in (80, 86, 89)
        if f"sm_{arch}" not in {row["part"] for row in rows}
    ]
    if absent:
        lines.append(f"Not timed with this build: the instructions of {' and '.join(absent)}.")
    unlike = sorted({name for row in rows for name in row["other_instructions"]})
    if not all(row["graph"] for row in rows):
        lines.append(
            "sol_attn is timed without a CUDA graph where its last block is ragged: none can be made of it there."
        )
    if unlike:
        lines.append(f"*: the card itself would run other matrix instructions in {', '.join(unlike)}.")
    return lines


def traffic_markdown(content):
    """GB that a call moves to and from memory, and what other cards would need for its kernels; empty where nothing was counted."""
    rows = [row for row in content["rows"] if row["part"] == TRAFFIC]
    if not rows:
        return ""
    columns = list(dict.fromkeys((row["shape"], row["sparsity"]) for row in rows))
    heads = [f"{shape}, {100 * sparsity:g}%" for shape, sparsity in columns]
    lines = ["| estimate | " + " | ".join(heads) + " |", "|---|" + "---|" * len(columns)]
    kernels = {(row["method"], row["shape"], row["sparsity"]): row["kernels"] for row in rows}
    for what, estimate in (
        ("GB to and from memory", _gigabytes),
        *((f"ms on an {s.name}", s.estimate) for s in SHEETS),
    ):
        cells = [_beside(estimate, *(kernels.get((method, *at)) for method in ("sla2", "sol_attn"))) for at in columns]
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    env = content["parts"][TRAFFIC]["environment"]
    lines += [
        "",
        f"SLA2 in INT8 with a ratio per head, in brackets sol_attn at an equal share: bytes counted by Nsight Compute on one {env['card']} (torch {env['torch']}, triton {env['triton']}). An estimate, no such card "
        "was timed: each kernel takes the longer of its bytes over the memory's rate and its time here over the card's multiprocessors times their clock, matrix products included. The caches are this card's (50 MB on "
        "an H100 or H200); an RTX 3090 has 6, a 4090 72, a 5090 96.",
    ]
    return "\n".join(lines)


def _gigabytes(kernels):
    return sum(kernel["read"] + kernel["written"] for kernel in kernels) / 1e9


def _beside(estimate, ours, rival):
    if ours is None:
        return "-"
    return f"{estimate(ours):.2f}" + ("" if rival is None else f" ({estimate(rival):.2f})")
