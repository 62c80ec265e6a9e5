"""Each method's attention error at 32,760 tokens against its time at the shapes of large models: one plot.

    python -m benchmarks.consumer --archs 90,89 --shapes 14B-720p,H3 --sparsities 0.97,0.99,0.9,0.95 --all-methods --peers FOLDER
        --out benchmarks/results/error-times-nvidia-h200.json                  the times
    python -m benchmarks.real_length ...                                       the errors
    python -m benchmarks.error_against_time                                    table, and docs/error_time.svg

Errors are those of benchmarks.real_length, the miniature's. Times are whole calls with random data at 14B-720p (40 heads, 75,600
tokens) and MiniMax H3 (56 heads, 42,000 tokens): on Hopper as shipped (sm_90), and in the instructions of an RTX 40 timed on
the same card (sm_89, see consumer_imitation). A fitted ratio: one call in four fits it, as the node does in runs of more than
8 steps; on Hopper 64 queries share a selection without a router, elsewhere 128. SLA v1 is timed in 8 bit and its error is that of 16 bit.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path

from tooling.paths import ROOT

from . import quality_variants as names
from .plot import COLOURS, axis, decades
from .results import RESULTS, load

SHAPES = {"14B-720p": "Wan 14B, 1280 x 720", "H3": "MiniMax H3"}
HOPPER = "sm_90"
PARTS = {HOPPER: "Hopper", "sm_89": "in an RTX 40's instructions"}
STEPS = 20  # of the runs whose errors are drawn
PANEL, GAP, LEFT, TOP = (360, 250), (70, 70), 70, 70


@dataclass(frozen=True)
class Method:
    """label: in the plot. variant, precision: of its error's row. timed: (method, setting) of its time's row."""

    label: str
    variant: str
    precision: str | None
    timed: tuple[str, str]


METHODS = (
    Method("SLA2 stage 2", names.STAGE_2, "int8", ("sla2", "a ratio per head")),
    Method("SLA2 stage 1", names.STAGE_1, "int8", ("sla2", "a ratio per head")),
    Method("SLA2 without a router, fitted", names.FITTED, "int8", ("sla2", "fitted")),
    Method("SLA2 without a router, estimated", names.UNTRAINED, "int8", ("sla2", "estimated")),
    Method("sol_attn, as many blocks in all", names.SOL_EQUAL, None, ("sol_attn", "equal share")),
    Method("sol_attn, tau 1.3", names.SOL_TAU, None, ("sol_attn", "tau 1.3")),
    Method("SLA v1, fitted proj_l", names.V1_FITTED, "16bit", ("sla2", "SLA v1")),
    Method("top-k only", names.BLOCK_SPARSE, "int8", ("sla2", "top-k only")),
)


def points(errors, times):
    """{(part, shape): {label: [(ms, error, sparsity)], sorted}} of what both files have."""
    found = {}
    for part in PARTS:
        for shape in SHAPES:
            of_panel = {}
            for method in METHODS:
                untrained = method.variant in (names.FITTED, names.UNTRAINED)
                variant = method.variant + names.OTHER_CARDS * (untrained and part != HOPPER)
                joined = [
                    (ms, row["error"], row["sparsity"])
                    for row in errors["rows"]
                    if (row["variant"], row["precision"], row["steps"]) == (variant, method.precision, STEPS)
                    and (ms := time_of(times["rows"], part, shape, row["sparsity"], *method.timed)) is not None
                ]
                if joined:
                    of_panel[method.label] = sorted(joined)
            if of_panel:
                found[part, shape] = of_panel
    return found


def time_of(rows, part, shape, sparsity, method, setting):
    """Milliseconds, or None where that was not measured or its output was wrong."""
    if setting == "fitted":
        # without a router 64 queries share a selection on Hopper
        queries = ", 64 queries" * (part == HOPPER)
        both = ("a ratio per head" + queries, "a call that fits" + queries)
        own, fits = (time_of(rows, part, shape, sparsity, method, name) for name in both)
        return None if None in (own, fits) else own + (fits - own) / names.EVERY
    keys = {"part": part, "shape": shape, "sparsity": sparsity, "method": method, "setting": setting}
    return next(
        (
            row["ms"]
            for row in rows
            if all(row[key] == value for key, value in keys.items()) and row.get("passed", True)
        ),
        None,
    )


def time_at(line, error):
    """Milliseconds at which a method reaches an error, logarithms of both interpolated between its points; None outside them."""
    for (slow, low, _), (fast, high, _) in zip(line[1:], line, strict=False):
        if low <= error <= high:
            part = (math.log(error) - math.log(low)) / max(math.log(high) - math.log(low), 1e-9)
            return math.exp(math.log(slow) + part * (math.log(fast) - math.log(slow)))
    return None


def markdown(found):
    """All points, and how much sooner SLA2 reaches sol_attn's errors."""
    lines = ["| card | shape | method | skips | ms | error | SLA2 fitted, stage 1 at this error |", "|---" * 7 + "|"]
    for (part, shape), methods in found.items():
        for label, line in methods.items():
            for ms, error, sparsity in line:
                skips = "-" if sparsity is None else f"{100 * sparsity:g}%"
                ours = "-"
                if label.startswith("sol_attn"):
                    at = [time_at(methods.get(METHODS[number].label, []), error) for number in (2, 1)]
                    ours = ", ".join("out of range" if own is None else f"{own:.2f} ms ({ms / own:.2f}x)" for own in at)
                lines.append(
                    f"| {PARTS[part]} | {SHAPES[shape]} | {label} | {skips} | {ms:.2f} | {error:.3f} | {ours} |"
                )
    return "\n".join(lines)


def draw(found):
    """SVG text: a panel per card and shape, time across and error upwards, both logarithmic."""
    shapes, parts = ([key for key in kind if any(key in pair for pair in found)] for kind in (SHAPES, PARTS))
    width = LEFT + len(parts) * (PANEL[0] + GAP[0])
    labels = [method.label for method in METHODS if any(method.label in methods for methods in found.values())]
    legend = TOP + len(shapes) * (PANEL[1] + GAP[1])
    height = legend + 20 * (1 + -(-len(labels) // 2))
    parts_of_svg = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        '<text x="20" y="26" font-size="16">Attention error (the miniature, 32,760 tokens) against time of a call</text>',
    ]
    errors = [error for methods in found.values() for line in methods.values() for _, error, _ in line]
    for across, part in enumerate(parts):
        for down, shape in enumerate(shapes):
            if (part, shape) in found:
                place = LEFT + across * (PANEL[0] + GAP[0]), TOP + down * (PANEL[1] + GAP[1])
                parts_of_svg += _panel(
                    found[part, shape], f"{SHAPES[shape]}, {PARTS[part]}", place, (min(errors), max(errors))
                )
    for number, label in enumerate(labels):
        x, y = LEFT + (width - LEFT) / 2 * (number % 2), legend + 20 * (number // 2)
        parts_of_svg.append(f'<rect x="{x:.0f}" y="{y - 6}" width="14" height="4" fill="{_colour(label)}"/>')
        parts_of_svg.append(f'<text x="{x + 20:.0f}" y="{y}">{escape(label)}</text>')
    return "\n".join([*parts_of_svg, "</svg>", ""])


def _panel(methods, title, place, errors):
    """Lines of one panel; its upper left corner is ``place``. errors: lowest and highest of all panels."""
    (x0, y0), (width, height) = place, PANEL
    times = [ms for line in methods.values() for ms, _, _ in line]
    place_x = axis(0.9 * min(times), 1.1 * max(times), x0, x0 + width, True)
    place_y = axis(0.9 * errors[0], 1.1 * errors[1], y0 + height, y0, True)
    lines = [f'<text x="{x0}" y="{y0 - 8}">{escape(title)}</text>']
    for ms in decades(0.9 * min(times), 1.1 * max(times)):
        at = place_x(ms)
        lines.append(f'<line x1="{at:.1f}" y1="{y0}" x2="{at:.1f}" y2="{y0 + height}" stroke="#eee"/>')
        lines.append(f'<text x="{at:.1f}" y="{y0 + height + 18}" text-anchor="middle">{ms:g} ms</text>')
    for error in decades(0.9 * errors[0], 1.1 * errors[1]):
        at = place_y(error)
        lines.append(f'<line x1="{x0}" y1="{at:.1f}" x2="{x0 + width}" y2="{at:.1f}" stroke="#eee"/>')
        lines.append(f'<text x="{x0 - 8}" y="{at + 4:.1f}" text-anchor="end">{error:g}</text>')
    lines.append(f'<rect x="{x0}" y="{y0}" width="{width}" height="{height}" fill="none" stroke="#999"/>')
    for label, line in methods.items():
        colour, thick = _colour(label), 3 if label.startswith("SLA2") else 1.5
        path = " ".join(f"{place_x(ms):.1f},{place_y(error):.1f}" for ms, error, _ in line)
        lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{thick}"/>')
        for ms, error, sparsity in line:
            x, y = place_x(ms), place_y(error)
            lines.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>')
            if sparsity is not None and label == METHODS[2].label:
                lines.append(f'<text x="{x + 5:.1f}" y="{y - 5:.1f}" font-size="10">{100 * sparsity:g}%</text>')
    return lines


def _colour(label):
    return COLOURS[[method.label for method in METHODS].index(label) % len(COLOURS)]


def results_of(folder=RESULTS):
    """(errors, times), the contents of the two results files; None where one was not measured."""
    found = [sorted(Path(folder).glob(f"{name}-*.json")) for name in ("real-length", "error-times")]
    return tuple(load(paths[0]) for paths in found) if all(found) else None


def plot(folder=RESULTS):
    """SVG text, or None where errors or times were not measured."""
    measured = results_of(folder)
    found = points(*measured) if measured else {}
    return draw(found) if found else None


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=RESULTS, help="with real-length-*.json and error-times-*.json")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "error_time.svg")
    args = parser.parse_args(argv)
    measured = results_of(args.folder)
    if measured is None:
        parser.error(
            f"{args.folder} needs real-length-*.json (benchmarks.real_length) and error-times-*.json (benchmarks.consumer)"
        )
    found = points(*measured)
    if not found:
        parser.error(
            "no method has both an error and a time: measure more of benchmarks.real_length and benchmarks.consumer"
        )
    args.out.write_text(draw(found), encoding="utf-8")
    print(f"{markdown(found)}\n\n{args.out}")


if __name__ == "__main__":
    sys.exit(main())
