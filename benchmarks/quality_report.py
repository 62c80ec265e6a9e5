"""The quality table and its bars, from the rows that quality.py measured."""

import statistics

from . import quality_variants as names

COLUMNS = (
    ("error", "output error", "{:.4f}"),
    ("validation_loss", "validation loss", "{:.4f}"),
    ("psnr", "PSNR dB", "{:.1f}"),
    ("ssim", "SSIM", "{:.4f}"),
    ("kept", "blocks kept", "{:.1%}"),
)


def markdown(content):
    """Rows by sparsity, the lowest output error first within each; then the bars and what was absent."""
    rows = content["rows"]
    columns = [column for column in COLUMNS if any(row.get(column[0]) is not None for row in rows)]
    lines = [
        "| skips | variant | bits | " + " | ".join(title for _, title, _ in columns) + " |",
        "|---|---|---|" + "---|" * len(columns),
    ]
    order = sorted(rows, key=lambda row: (-1 if row["sparsity"] is None else row["sparsity"], row["error"] or 0.0))
    for row in order:
        skips = "-" if row["sparsity"] is None else f"{100 * row['sparsity']:g}%"
        cells = [_cell(row.get(key), form) for key, _, form in columns]
        lines.append(f"| {skips} | {row['variant']} | {row['precision'] or '-'} | " + " | ".join(cells) + " |")
    lines += ["", content["about"]]
    lines += [f"- {'met' if met else 'NOT MET'}: {sentence}" for sentence, met in bars(rows)]
    lines += [f"- not measured: {name} ({why})" for name, why in content["absent"].items()]
    return "\n".join(lines)


def _cell(value, form):
    return "-" if value is None else form.format(value)


def real_length_markdown(content):
    """Table of what benchmarks.real_length measured: by steps and sparsity, the lowest attention error first; then what is missing."""
    rows = content["rows"]
    dense = {row["steps"]: row for row in rows if row["variant"] == names.DENSE}
    lines = [
        "| steps | skips | method | bits | attention error | validation loss | times dense's | PSNR dB | SSIM | frames right | videos right | blocks kept |",
        "|---" * 12 + "|",
    ]
    for row in sorted(rows, key=lambda row: (-row["steps"], row["sparsity"] or 0.0, row["error"])):
        videos = row["videos"]
        losses, base = row.get("validation_losses"), dense.get(row["steps"], {}).get("validation_losses")
        cells = [
            str(row["steps"]),
            "-" if row["sparsity"] is None else f"{100 * row['sparsity']:g}%",
            row["variant"],
            row["precision"] or "-",
            _spread(list(row["error_by_caption"].values()), 4, row["error"]),
            f"{statistics.fmean(losses):.4f}" if losses else "-",
            _times(losses, base),
            _spread([video["psnr"] for video in videos if "psnr" in video], 1),
            _spread([video["ssim"] for video in videos if "ssim" in video], 3),
            _spread([video["frames_right"] for video in videos], 2),
            f"{sum(video['passed'] for video in videos)} of {len(videos)}" if videos else "-",
            _cell(row["kept"], "{:.1%}"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    absent = content.get("absent", {})
    for why in dict.fromkeys(absent.values()):
        lines.append(f"- not measured, {why}: {'; '.join(name for name, reason in absent.items() if reason == why)}")
    lines += [f"- {content['left']} rows are left: the run was ended by --minutes."] if content.get("left") else []
    return "\n".join(lines)


def _times(losses, base):
    """Mean loss as a multiple of dense's, and the spread of that over the clips."""
    if not losses or not base:
        return "-"
    spread = f" ± {statistics.stdev(a / b for a, b in zip(losses, base, strict=True)):.2f}" if len(losses) > 1 else ""
    return f"{statistics.fmean(losses) / statistics.fmean(base):.2f}{spread}"


def _spread(values, digits, mean=None):
    """The mean and the standard deviation of one value, "-" where there is none."""
    if not values:
        return "-"
    mean = statistics.fmean(values) if mean is None else mean
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{spread}"


def layers_markdown(rows, sparsity):
    """Output error of every layer at one sparsity, 16-bit rows and those without a precision."""
    chosen = [row for row in rows if row["sparsity"] == sparsity and row["precision"] in (None, "16bit")]
    if not chosen:
        return ""
    layers = sorted(chosen[0]["error_by_layer"], key=int)
    lines = [
        f"| skips {100 * sparsity:g}% | " + " | ".join(f"layer {i}" for i in layers) + " |",
        "|---" * (len(layers) + 1) + "|",
    ]
    for row in chosen:
        cells = " | ".join(f"{row['error_by_layer'][i]:.4f}" for i in layers)
        lines.append(f"| {row['variant']} | {cells} |")
    return "\n".join(lines)


def bars(rows):
    """[(sentence, met)] of what the project promises of these errors, per sparsity."""
    found = []
    for sparsity in sorted({row["sparsity"] for row in rows if row["sparsity"] is not None}):
        error = {
            row["variant"]: row["error"]
            for row in rows
            if row["sparsity"] == sparsity and row["precision"] in (None, "16bit")
        }
        pairs = [(names.STAGE_1, other) for other in _stage_1_rivals()]
        pairs += [
            (names.UNTRAINED, names.SOL_EQUAL),
            (names.UNTRAINED, names.BLOCK_SPARSE),
            (names.UNTRAINED, names.POOLED),
        ]
        for ours, other in pairs:
            if error.get(ours) is not None and error.get(other) is not None:
                sentence = f"skips {100 * sparsity:g}%: {ours} {error[ours]:.4f}, {other} {error[other]:.4f}"
                worst = error[other] * (1.0 if ours == names.STAGE_1 else 1.0 + 1e-3)
                found.append((sentence, error[ours] <= worst))
    return found


def _stage_1_rivals():
    return (
        names.UNTRAINED,
        names.HEURISTIC,
        names.ESTIMATED,
        names.ROUTER_ONLY,
        names.BLOCK_SPARSE,
        names.V1_IDENTITY,
        names.V1_FITTED,
    )
