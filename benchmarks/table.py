"""The README's table, from the results file."""

from .ours import NAME, NO_LINEAR_BRANCH
from .results import timed
from .rivals.packages import BASELINE

GIB = 2**30
MODELS = {"1.3B-480p": "Wan 2.1 1.3B, 832 x 480", "14B-720p": "Wan 14B, 1280 x 720"}


def label(row):
    """Method, and for SLA2 what it ran with."""
    if row["method"] != NAME:
        return row["method"]
    if row["alpha"] == NO_LINEAR_BRANCH:
        return f"**SLA2**, {row['precision']}, no linear branch"
    return f"**SLA2**, {row['precision']}, {row['alpha']} ratio"


def times_by_method(rows, shapes):
    """{label: {(shape, sparsity): row}}; dense rows have sparsity None."""
    table = {}
    for row in timed(rows):
        if row["shape"] in shapes and row["data"] == "random":
            table.setdefault(label(row), {})[row["shape"], row["sparsity"]] = row
    return table


def markdown(content, part="shapes"):
    """Time per call in ms, and in brackets how many times faster than FlashAttention-2, per shape and sparsity.

    Raises ValueError where the part was not measured.
    """
    if part not in content["parts"]:
        raise ValueError(f"the results hold no part {part!r}: measure it first (python -m benchmarks.forward).")
    rows = [row for row in content["rows"] if row["part"] == part]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    sparsities = sorted({row["sparsity"] for row in timed(rows) if row["sparsity"] is not None}, reverse=True)
    columns = [(shape, sparsity) for shape in shapes for sparsity in sparsities]
    table = times_by_method(rows, shapes)
    base = {shape: table.get(BASELINE, {}).get((shape, None), {}).get("ms") for shape in shapes}
    lines = [
        "| method | " + " | ".join(f"{shape}, skips {100 * sparsity:g}%" for shape, sparsity in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for name, cells in table.items():
        row = [_cell(cells, shape, sparsity, base[shape]) for shape, sparsity in columns]
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    return "\n".join([*lines, "", *notes(content, part, rows)])


def _cell(cells, shape, sparsity, base):
    row = cells.get((shape, sparsity)) or cells.get((shape, None))
    if row is None:
        return "-"
    digits = 2 if row["ms"] < 100 else 0
    faster = f" ({base / row['ms']:.1f}x)" if base else ""
    return f"{row['ms']:.{digits}f} ms{faster}"


def notes(content, part, rows):
    """What the reader needs beside the table: card and versions, memory, absent peers, rows that failed."""
    about = content["parts"][part]
    env = about["environment"]
    versions = ", ".join(f"{name} {env[name]}" for name in ("torch", "triton", "cuda", "driver") if env.get(name))
    lines = [
        f"{env['card']}, {versions}. Forward pass, whole operation (routing and quantisation included), median. "
        f"In brackets: times faster than {BASELINE}."
    ]
    lines += [about["note"]] if "note" in about else []
    ours = [row for row in timed(rows) if row["method"] == NAME and row.get("peak_bytes") is not None]
    for shape in dict.fromkeys(row["shape"] for row in ours):
        most = max((row for row in ours if row["shape"] == shape), key=lambda row: row["peak_bytes"])
        share = most["peak_bytes"] / most["tensor_bytes"]
        lines.append(
            f"SLA2 needs at most {most['peak_bytes'] / GIB:.2f} GiB beside Q, K, V and the output at {shape}: "
            f"{share:.2f} times one of them."
        )
    lines += [f"Not installed, so not timed: {name} ({why})." for name, why in about["absent"].items()]
    for row in rows:
        where = f"{label(row)} at {row['shape']}" + (f", skips {100 * row['sparsity']:g}%" if row["sparsity"] else "")
        if row.get("failed"):
            lines.append(f"Failed: {where}: {row['failed']}.")
        elif not row.get("passed", True):
            lines.append(f"Left out, because its output was wrong or not repeatable: {where}.")
    return lines


def step_markdown(content):
    """Seconds of one denoising step in ComfyUI per model and resolution, from the file that comfyui_step writes."""
    parts = list(content["parts"])
    table = {}
    for row in content["rows"]:
        table.setdefault(row["variant"], {})[row["part"]] = row
    (dense, *_) = table
    models = [MODELS.get(part, part) for part in parts]
    lines = ["| one denoising step in ComfyUI | " + " | ".join(models) + " |", "|---" * (1 + len(parts)) + "|"]
    for name, rows in table.items():
        cells = [
            f"{rows[part]['seconds_per_step']:.2f} s ({_faster(table[dense], rows, part):.1f}x)"
            if part in rows
            else "-"
            for part in parts
        ]
        lines.append(f"| {name.replace('SLA2', '**SLA2**')} | " + " | ".join(cells) + " |")
    env = content["environment"]
    most = max(row["peak_bytes"] / table[dense][row["part"]]["peak_bytes"] for row in content["rows"])
    lines += [
        "",
        f"{env['card']}, ComfyUI {env['comfyui']}, torch {env['torch']}: ComfyUI's own Wan 2.1 classes with random weights, 81 frames, "
        f"one model call a step, median. Peak memory: at most {most:.3f} times dense.",
    ]
    return "\n".join(lines)


def calls_markdown(content, chosen=("",)):
    """Seconds of one model call per model and kind of weights, from the file that comfyui_calls writes.

    chosen: what the names of the columns begin with; all where left out.
    """
    parts = [p for p in content["parts"] if p.startswith(tuple(chosen)) and p not in ("crossover", "memory")]
    table = {}
    for row in content["rows"]:
        if row["part"] in parts:
            table.setdefault(row["variant"], {})[row["part"]] = row
    lines = ["| one step in ComfyUI | " + " | ".join(parts) + " |", "|---" * (1 + len(parts)) + "|"]
    for name, rows in table.items():
        cells = [_call_cell(rows.get(part), _dense_row(table, part)) for part in parts]
        lines.append(f"| {name.replace('SLA2', '**SLA2**')} | " + " | ".join(cells) + " |")
    env = content["environment"]
    lines += [
        "",
        f"{env['card']}, ComfyUI {env['comfyui']}, torch {env['torch']}: ComfyUI's own classes with random weights, one model "
        "call, as a distilled model makes one per step; in brackets how many times faster than ComfyUI's default, then what "
        f"the self-attention takes of it. Peak memory of SLA2: at most {_most_memory(table):.3f} times dense.",
    ]
    failed = [row for row in content["rows"] if row.get("failed") and row["part"] in parts]
    return "\n".join([*lines, *(f"Failed: {row['variant']} at {row['part']}: {row['failed']}." for row in failed)])


def memory_markdown(content):
    """What one attention call of MiniMax H3 takes, and whole calls on capped memory; empty where that was not measured."""
    rows = [row for row in content["rows"] if row["part"] == "memory"]
    if not rows:
        return ""
    lines = ["| memory of one attention call | beside q, k, v and its output |", "|---|---|"]
    for row in rows:
        if "q_bytes" in row:
            extra = "-" if row["extra_bytes"] is None else f"{row['extra_bytes'] / row['q_bytes']:.2f} x q"
            lines.append(f"| {row['variant'].replace('SLA2', '**SLA2**')} | {extra} |")
    lines += ["", "| one step | memory | int8 weights on the card | s | peak |", "|---|---|---|---|---|"]
    for row in rows:
        if "cap_gib" in row:
            lines.append(_capped_line(row))
    env = content["environment"]
    lines += [
        "",
        f"{rows[0]['model']}, {env['card']}, ComfyUI {env['comfyui']}, torch {env['torch']}: what PyTorch may take is capped; as many "
        "weights stay on the card as ComfyUI keeps there without its dynamic VRAM, the others are streamed in every step.",
        *(f"Failed: {row['variant']}: {row['failed']}." for row in rows if row.get("failed")),
    ]
    return "\n".join(lines)


def _capped_line(row):
    seconds = "failed" if row["seconds_per_step"] is None else f"{row['seconds_per_step']:.3g}"
    peak = f"{row['peak_bytes'] / 2**30:.1f} GiB" if "peak_bytes" in row else "-"
    on_card = f"{row['loaded_bytes'] / 2**30:.1f} of {row['weight_bytes'] / 2**30:.1f} GiB"
    return f"| {row['variant'].replace('SLA2', '**SLA2**')} | {row['cap_gib']} GiB | {on_card} | {seconds} | {peak} |"


def _most_memory(table):
    """Of SLA2 beside ComfyUI's default; compiled models have memory of their own."""
    shares = [
        row["peak_bytes"] / _dense_row(table, part)["peak_bytes"]
        for name, rows in table.items()
        if name.startswith("SLA2") and "compiled" not in name
        for part, row in rows.items()
        if "peak_bytes" in row and "peak_bytes" in (_dense_row(table, part) or ())
    ]
    return max(shares, default=float("nan"))


def _dense_row(table, part):
    return next(
        (rows[part] for name, rows in table.items() if name.startswith("dense, ComfyUI") and part in rows), None
    )


def _call_cell(row, dense):
    if row is None or row["seconds_per_step"] is None:
        return "-"
    seconds = row["seconds_per_step"]
    cell = f"{seconds:.3g} s"
    if dense is not None and dense["seconds_per_step"] is not None:
        cell += f" ({dense['seconds_per_step'] / seconds:.2f}x)"
    return cell if row.get("attention_seconds") is None else f"{cell}, {row['attention_seconds']:.2g} s"


def _faster(dense, rows, part):
    return dense[part]["seconds_per_step"] / rows[part]["seconds_per_step"]
