"""What it costs that a run measures its own error: one attention call through the node, with its ratio given, fitted, and measured.

    python -m benchmarks.looking_cost --device cuda
    python -m benchmarks.looking_cost --candidates          the sampled rows' kernel alone, in other configurations
    python -m benchmarks.looking_cost --tiny --device cpu

Random data at the shapes of real models, 97% skipped. A time is the median of triton.testing.do_bench over the whole call as
ComfyUI makes it: the host's part counts where the GPU waits for it. "host" is the time until a call returns, the GPU being idle
before; launches count copies, too. Of a run of 20 steps 8 fit and measure.
"""

import argparse
import functools
import math
from dataclasses import replace
from types import SimpleNamespace

import torch

from . import results
from .breakdown import kernel_times
from .measure import environment, is_gpu, launch_ms, median_ms
from .target_error import NodeAttention

# heads, grid
SHAPES = {
    "14B-720p": (40, (21, 45, 80)),
    "MiniMax H3": (56, (20, 42, 50)),
    "1.3B-480p": (12, (21, 30, 52)),
    "LTX-2": (32, (16, 22, 40)),
}
TINY = {"tiny": (2, (3, 10, 10))}
SHORT = 4  # steps of a run whose every call fits
MEASURING = 8 / 20  # of the steps of a run of 20
SPARSITY = 0.97
KINDS = {
    "given": {"ratio_mode": "fixed"},
    "fitted": {"ratio_mode": "fitted"},
    "measured": {"ratio_mode": "fitted", "target_error": 0.2},
}
SHOWN = 0.0005  # ms that a kernel adds, at least, to be named
WARPS_AND_STAGES = ((4, 1), (4, 2), (4, 3), (8, 2), (8, 3))
PROGRAMS = (264, 396, 528, 792, 1056)


def inputs(shape, device):
    """q, k, v (1, N, H, 128) of a shape."""
    heads, grid = shape
    torch.manual_seed(0)
    return [torch.randn(1, math.prod(grid), heads, 128, device=device, dtype=torch.bfloat16) for _ in range(3)]


def call_of(shape, device, settings):
    """A function that makes one sparse call of ``shape`` in a run of SHORT steps, which fits and measures in every call."""
    heads, grid = shape
    q, k, v = inputs(shape, device)
    config = SimpleNamespace(num_layers=2, num_heads=heads)
    node = NodeAttention(grid, config, SHORT, torch.device(device), lambda *_: None, sparsity=SPARSITY, **settings)
    node(0, q, k, v)
    node.choose(SPARSITY)
    return functools.partial(node, 1, q, k, v)


def measured(shape, device):
    """{kind: {"ms", "host ms", "kernels": {name: (ms, launches)}}} of one shape; on a CPU the times alone."""
    found = {}
    for kind, settings in KINDS.items():
        call = call_of(shape, device, settings)
        found[kind] = {"ms": median_ms(call, device)}
        if is_gpu(device):
            found[kind] |= {"host ms": launch_ms(call), "kernels": kernel_times(call)}
    return found


def lines(name, found):
    """What measured() found of a shape, in words."""
    given = found["given"]["ms"]
    for kind, row in found.items():
        extra = 100 * (row["ms"] / given - 1)
        words = f"{name}, {kind}: {row['ms']:.3f} ms"
        words += "" if kind == "given" else f", {extra:+.1f}% of each call, {MEASURING * extra:+.1f}% over 20 steps"
        if "kernels" in row:
            words += f"; host {row['host ms']:.3f} ms, {sum(n for _, n in row['kernels'].values()):.0f} launches"
        yield words
    before, after = (found[kind].get("kernels", {}) for kind in ("given", "measured"))
    added = {kernel: ms - before.get(kernel, (0.0, 0))[0] for kernel, (ms, _) in after.items()}
    for kernel, ms in sorted(added.items(), key=lambda item: -item[1]):
        if ms >= SHOWN:
            launches = after[kernel][1] - before.get(kernel, (0.0, 0))[1]
            yield f"    {ms:7.4f} ms more in {launches:.0f} more launches of {kernel[:90]}"


def candidates(shape, device):
    """[(FitConfig, ms)] of the sampled rows' attention over all keys, alone, fastest first."""
    from sla2_kernels.fitted_attention import sample_rows
    from sla2_kernels.kernels.configs import fit_config
    from sla2_kernels.kernels.fitted_ratio import FittedRatio
    from sla2_kernels.router import K_BLOCK, Q_BLOCK, block_count
    from sla2_kernels.support import capability
    from sla2_kernels.triton_backend import Sample

    heads, grid = shape
    q, k, v = (x.transpose(1, 2) for x in inputs(shape, device))
    tokens = math.prod(grid)
    blocks = block_count(tokens, Q_BLOCK), block_count(tokens, K_BLOCK)
    unselected = (torch.rand(heads, *blocks, device=device) < SPARSITY).to(q.dtype)
    rows = sample_rows(tokens, 0, device)
    fit = FittedRatio(Sample(rows, len(rows), None, None), None, Q_BLOCK)
    current = fit_config(capability(q.device), q.element_size())
    found = []
    for warps, stages in WARPS_AND_STAGES:
        for programs in PROGRAMS:
            config = replace(current, num_warps=warps, num_stages=stages, programs=programs)
            attend = functools.partial(fit.attend, q, k, v, unselected, scale_log2=0.1275, config=config)
            found.append((config, median_ms(attend, device, least_ms=30)))
    return sorted(found, key=lambda pair: pair[1])


def print_candidates(name, shape, device):
    heads, grid = shape
    gigabytes = 2 * math.prod(grid) * heads * 128 * 2 / 1e9
    print(f"{name}: sampled rows over all keys, {gigabytes:.2f} GB of K and V; warps, stages, programs at most:")
    for c, ms in candidates(shape, device):
        print(f"    {ms:.4f} ms, {gigabytes / ms:.2f} TB/s: {c.num_warps}, {c.num_stages}, {c.programs}", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--candidates", action="store_true")
    parser.add_argument("--out", help="JSON file for the figures")
    args = parser.parse_args(argv)
    found = {}
    for name, shape in (TINY if args.tiny else SHAPES).items():
        if args.candidates:
            print_candidates(name, shape, args.device)
            continue
        found[name] = measured(shape, args.device)
        print("\n".join(lines(name, found[name])), flush=True)
        if args.out:
            results.save(args.out, {"environment": environment(args.device), "shapes": found})


if __name__ == "__main__":
    main()
