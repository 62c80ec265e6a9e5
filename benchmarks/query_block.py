"""128 or 64 query tokens per selection: times of both in one run, and the error of both in the same time.

    python -m benchmarks.query_block              INT8, a given ratio, by CUDA graph; each setting is checked first
    python -m benchmarks.query_block --checks     every kernel with 64 against float64, forward and backward; nothing is timed

The errors are those of docs/ROUTER_DECISIONS.md, "Query tokens per selection". In the time that 64 takes, 128 affords more key
blocks: times are taken as linear in the kept share, and error and kept share are interpolated in their logarithms.
"""

import argparse
import math
import statistics
import sys

import torch

from sla2_kernels import select_key_blocks, sla2_attention
from sla2_kernels.fitted_attention import fitted_attention, sample_rows
from sla2_kernels.loops import watch_loops
from sla2_kernels.reference import fitted_ratio, sla2_reference

from .inputs import Shape, make_inputs
from .measure import environment, graph_timer, is_gpu, median_ms, use_device

SHAPES = (
    Shape("14B-720p", 40, (21, 45, 80)),
    Shape("MiniMax H3", 56, (1, 1, 42000)),
    Shape("1.3B-480p", 12, (21, 30, 52)),
)
CHECKED = Shape("checked", 3, (5, 20, 31))
QUERY_BLOCKS = (128, 64)
SPARSITIES = (0.97, 0.95, 0.90)
TOLERANCE = {"16bit": 0.01, "int8": 0.06, "fp8": 0.09}  # of the output against float64, Gaussian inputs
GRADIENT_TOLERANCE = 0.01
CALLS, ROUNDS = 3, 7
# docs/ROUTER_DECISIONS.md: error by kept share and query tokens per selection, at 32,760 tokens, ratio fitted
KEPT = (0.03, 0.05, 0.07, 0.10, 0.15)
ERRORS = {
    "untrained": {128: (0.178, 0.140, 0.118, 0.098, 0.081), 64: (0.146, 0.120, 0.105, 0.090, 0.076)},
    "trained": {128: (0.156, 0.118, 0.098, 0.081, 0.067), 64: (0.131, 0.102, 0.087, 0.073, 0.061)},
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--checks", action="store_true", help="check every kernel, time nothing")
    parser.add_argument("--kind", default="random", help="of the inputs that are timed, see benchmarks/inputs.py")
    args = parser.parse_args(argv)
    use_device(args.device)
    print(environment(args.device))
    if args.checks:
        return 0 if all_checks(args.device) else 1
    if not all([check(args.device, "int8", block, ratio) for block in QUERY_BLOCKS for ratio in ("given", "fitted")]):
        return 1
    shapes = SHAPES if is_gpu(args.device) else (CHECKED,)
    times = {shape.name: measured(shape, args.kind, args.device) for shape in shapes}
    print(tables(times))
    return 0


def all_checks(device):
    """Whether every kernel gives the reference's output and gradients with 64 query tokens per selection."""
    precisions = ("int8", "16bit", "fp8")
    passed = [check(device, p, 64, ratio) for p in precisions for ratio in ("given", "estimated", "none", "fitted")]
    passed += [check_gradients(device, block) for block in QUERY_BLOCKS]
    return all(passed)


def call(q, k, v, query_block, sparsity, precision="int8", ratio="given"):
    """The output of one call as the untrained mode makes it, (B, N, H, D), own key blocks kept."""
    settings = {"sparsity": sparsity, "precision": precision, "layout": "BNHD", "keep_diagonal": True}
    settings["query_block"] = query_block
    if ratio == "fitted":
        return fitted_attention(q, k, v, rows=sample_rows(q.shape[1], 0, q.device), **settings).out
    alpha = given_ratio(q) if ratio == "given" else None
    return sla2_attention(q, k, v, alpha=alpha, linear_branch=ratio != "none", **settings)


def given_ratio(q):
    """One ratio per head of q (B, N, H, D)."""
    return torch.linspace(0.6, 0.95, q.shape[2], device=q.device)


def check(device, precision, query_block, ratio):
    """Whether outputs on a few thousand tokens, the last block ragged, are those of the float64 definition; prints the error."""
    q, k, v = make_inputs(CHECKED, device=device)
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    worst = 0.0
    for sparsity in SPARSITIES:
        with watch_loops() as loops:
            out = call(q, k, v, query_block, sparsity, precision, ratio)
        chosen = {"sparsity": sparsity, "layout": "BNHD", "keep_diagonal": True, "query_block": query_block}
        blocks = select_key_blocks(q, k, **chosen)
        alpha = given_ratio(q) if ratio == "given" else None
        if ratio == "fitted":
            rows = sample_rows(q.shape[1], 0, q.device)[:24]
            alpha = fitted_ratio(*heads_first, blocks, rows, query_block=query_block)[0][0]
        options = {"key_blocks": blocks, "linear_branch": ratio != "none", "query_block": query_block}
        expected, _ = sla2_reference(*heads_first, alpha=alpha, **options)
        worst = max(worst, relative_error(out.transpose(1, 2), expected))
    verdict = "ok" if worst <= TOLERANCE[precision] else "WRONG"
    names = ", ".join(sorted({loop.name for loop in loops}))
    print(f"{verdict}: {precision}, {query_block} query tokens, {ratio} ratio: error {worst:.4f} ({names})", flush=True)
    return worst <= TOLERANCE[precision]


def check_gradients(device, query_block):
    """Whether the gradients of q, k and v are those of the float64 definition; prints the largest error."""
    q, k, v = (x.transpose(1, 2).contiguous() for x in make_inputs(CHECKED, device=device))
    blocks = select_key_blocks(q, k, sparsity=0.9, query_block=query_block)
    alpha, grad = given_ratio(q.transpose(1, 2)), torch.randn_like(q)
    options = {"key_blocks": blocks, "alpha": alpha, "query_block": query_block}
    leaves = [x.requires_grad_() for x in (q, k, v)]
    found = torch.autograd.grad(sla2_attention(*leaves, precision="16bit", **options), leaves, grad)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    expected = torch.autograd.grad(sla2_reference(*wide, **options)[0], wide, grad.double())
    worst = max(relative_error(*pair) for pair in zip(found, expected, strict=True))
    verdict = "ok" if worst <= GRADIENT_TOLERANCE else "WRONG"
    print(f"{verdict}: gradients, {query_block} query tokens: error {worst:.4f}", flush=True)
    return worst <= GRADIENT_TOLERANCE


def relative_error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@torch.no_grad()
def measured(shape, kind, device):
    """{(query block, sparsity): median ms of one call}, all settings in turn, round after round."""
    q, k, v = make_inputs(shape, kind, device=device)
    settings = [(block, sparsity) for sparsity in SPARSITIES for block in QUERY_BLOCKS]
    runs = {setting: timer(lambda setting=setting: call(q, k, v, *setting), device) for setting in settings}
    times = {setting: [] for setting in settings}
    for _ in range(ROUNDS):
        for setting, run in runs.items():
            times[setting].append(run())
    return {setting: statistics.median(seconds) for setting, seconds in times.items()}


def timer(function, device):
    """A function that returns the milliseconds of one function()."""
    return graph_timer(function, CALLS) if is_gpu(device) else lambda: median_ms(function, device)


def tables(times):
    """Markdown of the times, and of the error in the same time."""
    skips = ", ".join(f"{100 * sparsity:g}%" for sparsity in SPARSITIES)
    lines = [f"| ms at {skips} | {' | '.join(times)} |", "|---|" + "---|" * len(times)]
    for block in QUERY_BLOCKS:
        cells = [", ".join(f"{found[block, sparsity]:.3f}" for sparsity in SPARSITIES) for found in times.values()]
        lines.append(f"| {block} query tokens | {' | '.join(cells)} |")
    lines += [
        "",
        f"| error of 64 over that of 128 in the same time | {' | '.join(times)} |",
        "|---|" + "---|" * len(times),
    ]
    for kind in ERRORS:
        for sparsity in SPARSITIES:
            cells = [cell(found, kind, sparsity) for found in times.values()]
            lines.append(f"| {kind}, 64 at {100 * sparsity:g}% | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(times, kind, sparsity):
    """The error of 64 at a sparsity against that of 128 in the time of 64, and what 128 skips then."""
    kept = affordable([times[128, s] for s in SPARSITIES], times[64, sparsity])
    ratio = error(kind, 64, 1 - sparsity) / error(kind, 128, kept)
    return f"{100 * (ratio - 1):+.1f}% (128 at {100 * (1 - kept):.1f}%)"


def affordable(times, budget):
    """Share of key blocks that 128 keeps in ``budget`` ms; times: at SPARSITIES, linear in the kept share between and beyond."""
    kept = [1 - sparsity for sparsity in SPARSITIES]
    above = next((i for i, ms in enumerate(times[:-1]) if ms >= budget), len(times) - 1)
    i = max(above, 1)
    slope = (kept[i] - kept[i - 1]) / (times[i] - times[i - 1])
    return max(kept[i] + (budget - times[i]) * slope, 0.01)


def error(kind, query_block, kept):
    """Of ERRORS at any kept share, straight lines between the logarithms."""
    errors = ERRORS[kind][query_block]
    i = next((i for i in range(1, len(KEPT) - 1) if kept <= KEPT[i]), len(KEPT) - 1)
    part = math.log(kept / KEPT[i - 1]) / math.log(KEPT[i] / KEPT[i - 1])
    return errors[i - 1] * (errors[i] / errors[i - 1]) ** part


if __name__ == "__main__":
    sys.exit(main())
