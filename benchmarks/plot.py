"""Plots as SVG, with no plotting library: speed-up bars of the table, time against sequence length and sparsity."""

import math
from html import escape

from .results import timed
from .rivals.packages import BASELINE
from .table import label

WIDTH, HEIGHT = 900, 520
LEFT, RIGHT, TOP, BOTTOM = 80, 320, 40, 60
COLOURS = ("#d62728", "#ff7f0e", "#1f77b4", "#17becf", "#2ca02c", "#8c564b", "#9467bd", "#e377c2", "#7f7f7f", "#bcbd22")


def series(rows, x):
    """{label: sorted [(x, ms)]} of the rows of one part."""
    lines = {}
    for row in timed(rows):
        lines.setdefault(label(row).replace("*", ""), []).append((row[x], row["ms"]))
    return {name: sorted(points) for name, points in lines.items()}


def length_plot(rows):
    """SVG text: time against tokens, both axes logarithmic."""
    return draw(series(rows, "tokens"), "Attention, forward, 12 heads of 128, skips 97%", "tokens", log_x=True)


def sparsity_plot(rows):
    """SVG text: time against the share of skipped key blocks; dense methods are level lines."""
    sparse = series([row for row in rows if row["sparsity"] is not None], "percent")
    ends = [x for points in sparse.values() for x, _ in points] or [0]
    dense = series(
        [{**row, "end": end} for row in rows if row["sparsity"] is None for end in (min(ends), max(ends))], "end"
    )
    return draw({**dense, **sparse}, "Attention, forward, Wan 1.3B at 480p", "skipped key blocks in %", log_x=False)


def speed_plot(rows, percent=97):
    """SVG text: how many times faster than the baseline each method is, a bar per shape, sparse ones at ``percent``."""
    rows = [row for row in timed(rows) if row["data"] == "random" and row["percent"] in (None, percent)]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    base = {row["shape"]: row["ms"] for row in rows if row["method"] == BASELINE}
    bars = {}
    for row in rows:
        bars.setdefault(label(row).replace("*", ""), {})[row["shape"]] = base[row["shape"]] / row["ms"]
    longest = max(value for values in bars.values() for value in values.values())
    thick, gap, top, left = 14, 10, 64, 250
    step = thick * len(shapes) + gap
    height = top + step * len(bars) + 10
    title = f"Times faster than {BASELINE}, sparse methods skip {percent}% of key blocks"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="20" y="26" font-size="16">{escape(title)}</text>',
    ]
    for number, shape in enumerate(shapes):
        parts.append(f'<rect x="{left + 190 * number}" y="38" width="14" height="12" fill="{COLOURS[2 + number]}"/>')
        parts.append(f'<text x="{left + 190 * number + 20}" y="49">{escape(shape)}</text>')
    for number, (name, values) in enumerate(bars.items()):
        y = top + step * number
        weight = ' font-weight="bold"' if name.startswith("SLA2") else ""
        middle = y + thick * len(shapes) / 2 + 4
        parts.append(f'<text x="{left - 10}" y="{middle:.1f}" text-anchor="end"{weight}>{escape(name)}</text>')
        for line, shape in enumerate(shapes):
            if shape not in values:
                continue
            width = (WIDTH - left - 80) * values[shape] / longest
            at = y + thick * line
            parts.append(
                f'<rect x="{left}" y="{at}" width="{width:.1f}" height="{thick - 2}" fill="{COLOURS[2 + line]}"/>'
            )
            parts.append(f'<text x="{left + width + 6:.1f}" y="{at + 11}">{values[shape]:.1f}x</text>')
    return "\n".join([*parts, "</svg>", ""])


DRAW = {"shapes": speed_plot, "length": length_plot, "sparsity": sparsity_plot}


def part_plot(content, part):
    """SVG text of one part of a results file, or None where that was not measured or lacks what the plot compares with."""
    rows = [row for row in content["rows"] if row["part"] == part]
    if part == "shapes" and all(row["method"] != BASELINE for row in rows):
        return None
    return DRAW[part](rows) if rows else None


def draw(lines, title, x_name, *, log_x):
    """SVG text of lines {name: [(x, ms)]}; ms is drawn on a logarithmic axis.

    Raises ValueError where there is nothing to draw.
    """
    if not lines:
        raise ValueError("nothing to plot: measure the parts length and sparsity first.")
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    place_x = axis(min(xs), max(xs), LEFT, WIDTH - RIGHT, log_x)
    place_y = axis(min(ys), max(ys), HEIGHT - BOTTOM, TOP, True)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="24" font-size="16">{escape(title)}</text>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 14}" text-anchor="middle">{escape(x_name)}</text>',
        f'<text x="20" y="{HEIGHT / 2}" transform="rotate(-90 20 {HEIGHT / 2})" text-anchor="middle">ms</text>',
    ]
    for x in sorted(set(xs)):
        at = place_x(x)
        parts.append(f'<line x1="{at:.1f}" y1="{TOP}" x2="{at:.1f}" y2="{HEIGHT - BOTTOM}" stroke="#eee"/>')
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{_tick(x)}</text>')
    for y in decades(min(ys), max(ys)):
        at = place_y(y)
        parts.append(f'<line x1="{LEFT}" y1="{at:.1f}" x2="{WIDTH - RIGHT}" y2="{at:.1f}" stroke="#eee"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{y:g}</text>')
    for number, (name, points) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        width = 3 if name.startswith("SLA2") else 1.5
        path = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>')
        at = TOP + 20 * number
        parts.append(f'<rect x="{WIDTH - RIGHT + 16}" y="{at}" width="14" height="4" fill="{colour}"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 36}" y="{at + 7}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def axis(low, high, first, last, logarithmic):
    """value -> where it lies between first and last, which are the places of low and high."""
    scale = math.log if logarithmic else float
    low, high = scale(low), scale(high)
    span = (high - low) or 1.0
    return lambda value: first + (scale(value) - low) / span * (last - first)


def _tick(x):
    return f"{x / 1024:g}K" if x >= 1024 else f"{x:g}"


def decades(low, high):
    """1, 2, 5 of each power of ten between the ends."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks = [digit * 10.0**power for power in range(first, last + 1) for digit in (1, 2, 5)]
    return [tick for tick in ticks if low <= tick <= high]
