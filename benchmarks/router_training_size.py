"""What training a router takes at the sizes that people run: seconds per layer and step, and memory. Random activations.

    python -m benchmarks.router_training_size                      on a GPU, about a minute
    python -m benchmarks.router_training_size --models H3 --top 12 one model, and which kernels a step's time goes to
    python -m benchmarks.router_training_size --tiny --device cpu  tries the script
    python -m benchmarks.router_training_size --against FOLDER     another working tree first, then this one

The trainer keeps projections, their averages and Adam's two moments of every layer on the device; a step's working memory is bounded by
TrainerOptions.memory_bytes, or by what one head with one query block needs where that is more.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

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


class Launches(TorchDispatchMode):
    """Counts the operations that are kernels on a GPU: all but views, allocations and what stays on the host."""

    HOST = (
        "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh",
        "scalar_tensor", "_unsafe_view", "_local_scalar_dense",
    )  # fmt: skip

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        self.count += not (function.is_view or name in self.HOST or name.startswith("profiler::"))
        return function(*args, **(kwargs or {}))


def launches(observe, device):
    """What one further step of observe(steps) starts: kernels on a GPU as the profiler sees them, operations on the CPU."""
    counts = []
    for steps in (1, 2):
        if torch.device(device).type == "cuda":
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                observe(steps)
                torch.cuda.synchronize()
            counts.append(sum(event.count for event in profile.key_averages() if event.self_device_time_total))
        else:
            with Launches() as seen:
                observe(steps)
            counts.append(seen.count)
    return counts[1] - counts[0]


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

    def observe(count):
        trainer.observe(0, q, k, v, steps=count, layout="BNHD", prefix=model.prefix)

    memory = Peak(device)
    observe(1)
    begun = synchronised_time(device)
    observe(steps)
    seconds = (synchronised_time(device) - begun) / steps
    projections = 2 * (model.heads if per_head else 1) * model.head_dim**2 * 4
    pair, block = memory_of(model.tokens + model.prefix, model.head_dim)
    peak, kept = memory.peak(), memory.kept()
    largest = largest_operations(lambda: observe(1), device, top) if top else []
    return {
        "model": model.name,
        "per head": per_head,
        "seconds per layer and step": seconds,
        "launches per step": launches(observe, device),
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


def measure_other(args):
    """Prints the rows of another working tree's trainer, measured by this script in a process of its own."""
    if not (args.against / "sla2_training").is_dir():
        raise SystemExit(
            f"--against must be a working tree of this repository, but {args.against} has no sla2_training."
        )
    command = [sys.executable, __file__, "--device", args.device, "--steps", str(args.steps)]
    command += ["--models", args.models, "--top", str(args.top), *(["--tiny"] if args.tiny else [])]
    print(f"{args.against}:", flush=True)
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(args.against.resolve())}, check=True)  # noqa: S603
    print("this tree:", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=4, help="timed steps")
    parser.add_argument("--models", default="", help="those alone whose names hold this text")
    parser.add_argument("--top", type=int, default=0, help="take a step apart: so many of its operations")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="measure the trainer of this working tree first")
    parser.add_argument("--out", type=Path, help="write the rows as JSON, after each of them")
    args = parser.parse_args(argv)
    models = [model for model in (TINY if args.tiny else MODELS) if args.models in model.name]
    if not models:
        parser.error(f"--models must be part of one of these: {'; '.join(model.name for model in MODELS)}.")
    if args.against:
        measure_other(args)
    rows = []
    for model in models:
        for per_head in (True, False):
            rows.append(measure(model, args.device, args.steps, per_head, args.top))
            print(json.dumps(rows[-1]), flush=True)
            if args.out:
                args.out.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
