"""What training a router takes at the sizes that people run: seconds per layer and step, and memory. Random activations.

    python -m benchmarks.router_training_size                      on a GPU, about a minute
    python -m benchmarks.router_training_size --models H3 --top 12 one model, and which kernels a step's time goes to
    python -m benchmarks.router_training_size --tiny --device cpu  tries the script

The trainer keeps projections and Adam's two moments of every layer on the device; a step's working memory is bounded by
TrainerOptions.memory_bytes, or by what one head with one query block needs where that is more.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from sla2_training import RouterTrainer, TrainerOptions
from sla2_training.block_sums import memory_of

STEPS_PER_LAYER = 120  # the node's default
SPARSITIES = (0.97, 0.95, 0.90)


@dataclass(frozen=True)
class Model:
    """tokens: of the video. prefix: text and sound before it."""

    name: str
    layers: int
    heads: int
    tokens: int
    prefix: int = 0
    head_dim: int = 128


MODELS = (
    Model("MiniMax H3, 1344 x 768 x 124", 50, 56, 42_000, prefix=700),
    Model("LTX-2, second stage 1280 x 704 x 121", 48, 32, 14_080),
    Model("Wan 14B, 720p, 81 frames", 40, 40, 75_600),
)
TINY = (Model("tiny", 3, 2, 640, prefix=70, head_dim=32),)


def activations(model, device, dtype):
    """q of the video's tokens, k and v of all, (1, N, H, D)."""
    generator = torch.Generator(device).manual_seed(0)

    def made(tokens):
        return torch.randn(1, tokens, model.heads, model.head_dim, generator=generator, device=device, dtype=dtype)

    keys = model.tokens + model.prefix
    return made(model.tokens), made(keys), made(keys)


class Peak:
    """Bytes that were allocated at most since it was made, beyond those allocated then; 0 on the CPU."""

    def __init__(self, device):
        self.is_cuda = torch.device(device).type == "cuda"
        if self.is_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()

    def peak(self):
        return torch.cuda.max_memory_allocated() - self.before if self.is_cuda else 0

    def kept(self):
        return torch.cuda.memory_allocated() - self.before if self.is_cuda else 0


def synchronised_time(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def largest_operations(step, device, count):
    """(name, share of all, milliseconds, calls) of the operations that take most of the device's time in step()."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.device(device).type == "cuda":
        activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
    rows = [(event, event.self_device_time_total or event.self_cpu_time_total) for event in profile.key_averages()]
    total = sum(microseconds for _, microseconds in rows)
    rows.sort(key=lambda row: -row[1])
    return [(event.key[:80], spent / total, spent / 1000, event.count) for event, spent in rows[:count]]


def measure(model, device, steps, per_head, top):
    """One layer of ``model``: a first step alone, then ``steps`` that are timed, then one that is taken apart if ``top``."""
    options = TrainerOptions(per_head=per_head)
    q, k, v = activations(model, device, torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32)
    trainer = RouterTrainer("size", model.layers, model.heads, model.head_dim, sparsities=SPARSITIES, options=options)
    shown = {"layout": "BNHD", "prefix": model.prefix}
    memory = Peak(device)
    trainer.observe(0, q, k, v, steps=1, **shown)
    begun = synchronised_time(device)
    trainer.observe(0, q, k, v, steps=steps, **shown)
    seconds = (synchronised_time(device) - begun) / steps
    projections = 2 * (model.heads if per_head else 1) * model.head_dim**2 * 4
    pair, block = memory_of(model.tokens + model.prefix, model.head_dim)
    peak, kept = memory.peak(), memory.kept()
    largest = largest_operations(lambda: trainer.observe(0, q, k, v, steps=1, **shown), device, top) if top else []
    return {
        "model": model.name,
        "per head": per_head,
        "seconds per layer and step": seconds,
        "hours for all layers": seconds * model.layers * STEPS_PER_LAYER / 3600,
        "peak bytes of a step": peak,
        "bytes kept per layer": kept,
        "bytes kept per layer, by the formula": 3 * projections,
        "bytes kept by all layers": 3 * projections * model.layers,
        "bound on a step": max(options.memory_bytes, pair + block),
        "router file, float32": projections * model.layers,
        "query blocks": trainer.query_blocks,
        "largest operations": largest,
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=4, help="timed steps")
    parser.add_argument("--models", default="", help="those alone whose names hold this text")
    parser.add_argument("--top", type=int, default=0, help="take a step apart: so many of its operations")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, help="write the rows as JSON, after each of them")
    args = parser.parse_args(argv)
    models = [model for model in (TINY if args.tiny else MODELS) if args.models in model.name]
    if not models:
        parser.error(f"--models must be part of one of these: {'; '.join(model.name for model in MODELS)}.")
    rows = []
    for model in models:
        for per_head in (True, False):
            rows.append(measure(model, args.device, args.steps, per_head, args.top))
            print(json.dumps(rows[-1]), flush=True)
            if args.out:
                args.out.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
