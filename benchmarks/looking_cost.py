"""What it costs that a run measures its own error: one attention call through the node, with its ratio given, fitted, and measured.

    python -m benchmarks.looking_cost --device cuda
    python -m benchmarks.looking_cost --tiny --device cpu

Random data at the shapes of real models, 97% skipped. A time is the median of triton.testing.do_bench over the whole call as
ComfyUI makes it: the host's part counts where the GPU waits for it.
"""

import argparse
import functools
from types import SimpleNamespace

import torch

from . import results
from .measure import environment, median_ms
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
SPARSITY = 0.97
KINDS = {
    "given": {"ratio_mode": "fixed"},
    "fitted": {"ratio_mode": "fitted"},
    "measured": {"ratio_mode": "fitted", "target_error": 0.2},
}


def call_of(shape, device, settings):
    """A function that makes one sparse call of ``shape`` in a run of SHORT steps, which fits and measures in every call."""
    heads, grid = shape
    tokens = grid[0] * grid[1] * grid[2]
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, tokens, heads, 128, device=device, dtype=torch.bfloat16) for _ in range(3))
    config = SimpleNamespace(num_layers=2, num_heads=heads)
    node = NodeAttention(grid, config, SHORT, torch.device(device), lambda *_: None, sparsity=SPARSITY, **settings)
    node(0, q, k, v)
    node.choose(SPARSITY)
    return functools.partial(node, 1, q, k, v)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", help="JSON file for the figures")
    args = parser.parse_args(argv)
    found = {}
    for name, shape in (TINY if args.tiny else SHAPES).items():
        found[name] = {
            kind: median_ms(call_of(shape, args.device, settings), args.device) for kind, settings in KINDS.items()
        }
        given = found[name]["given"]
        extra = {kind: 100 * (ms / given - 1) for kind, ms in found[name].items()}
        print(
            f"{name}: " + ", ".join(f"{kind} {ms:.3f} ms ({extra[kind]:+.1f}%)" for kind, ms in found[name].items()),
            flush=True,
        )
        if args.out:
            results.save(args.out, {"environment": environment(args.device), "ms": found})


if __name__ == "__main__":
    main()
