"""Time per denoising step of ComfyUI's own Wan 2.1 classes at full size: dense attention against SLA2.

    python -m benchmarks.comfyui_step --comfyui PATH                       1.3B at 480p and 14B at 720p, 81 frames
    python -m benchmarks.comfyui_step --comfyui PATH --runs 1.3B-480p      one of them

Weights are random, made on the GPU; nothing is downloaded. SLA2 runs through the pack's own hook on a ModelPatcher, sampled
by ComfyUI's sampler. Untrained: with a ratio fitted in every call, an estimated one, and a fixed one, which costs what a learned one does. Writes
benchmarks/results/comfyui-step-<card>.json.
"""

import argparse
import gc
import importlib
import statistics
import sys
from pathlib import Path

import torch

from tooling.comfyui import find_comfyui

from . import results
from .breakdown import StepParts, costliest_kernels
from .measure import environment, is_gpu
from .rivals.packages import add_peer_folders
from .wan_in_comfyui import (
    LATENTS,
    SIZES,
    default_backend,
    import_comfyui,
    load_pack,
    make_model,
    registered_backends,
    sample,
    use_backend,
)

GIB = 2**30
RATIOS = ("fitted", "estimated", "fixed")


def main(argv=None):
    args = parse(argv)
    add_peer_folders(args.peers)
    import_comfyui(args.comfyui, args.device)
    about = {"environment": {**environment(args.device), "comfyui": comfyui_version()}, "default": default_backend()}
    print(", ".join(f"{name} {value}" for name, value in about["environment"].items()))
    path = args.out or results.RESULTS / f"comfyui-step-{results.card_file(about['environment']['card']).name}"
    for run in args.runs:
        rows = measure(run, args)
        content = results.replace_part(results.load(path), run, rows, about)
        results.save(path, content)
        print("\n" + markdown(rows) + "\n", flush=True)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", default=find_comfyui()[1])
    parser.add_argument(
        "--runs", type=_runs, default=["1.3B-480p", "14B-720p"], help="MODEL-RESOLUTION, comma-separated"
    )
    parser.add_argument("--steps", type=int, default=3, help="timed steps; one more warms up")
    parser.add_argument("--sparsity", type=float, default=0.97)
    parser.add_argument("--precision", choices=("auto", "int8", "fp8", "16bit"), default="auto")
    parser.add_argument("--ratios", nargs="+", choices=RATIOS, default=list(RATIOS))
    parser.add_argument("--peers", help="folder with packages for ComfyUI's other attention backends")
    parser.add_argument("--default-only", action="store_true", help="time no other dense backend")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def _runs(text):
    runs = text.split(",")
    for run in runs:
        model, _, resolution = run.partition("-")
        if model not in SIZES or resolution not in LATENTS:
            raise argparse.ArgumentTypeError(f"{run!r} is no MODEL-RESOLUTION of {tuple(SIZES)} and {tuple(LATENTS)}")
    return runs


def comfyui_version():
    try:
        from comfyui_version import __version__
    except ImportError:
        return None
    return __version__


def measure(run, args):
    """The rows of one model and resolution: dense default, dense backends, SLA2."""
    name, _, resolution = run.partition("-")
    dtype = torch.bfloat16 if is_gpu(args.device) else torch.float32
    model = make_model(SIZES[name], args.device, dtype)
    latent = LATENTS[resolution]
    variants = [("dense, ComfyUI's default", model)]
    if not args.default_only:
        variants += [(f"dense, {backend}", use_backend(model, backend)) for backend in registered_backends()]
    variants += [(sla2_name(args, ratio), with_sla2(model, args, ratio)) for ratio in args.ratios]
    broken_down = (variants[0][0], sla2_name(args, args.ratios[0]))
    rows = []
    for variant, patched in variants:
        row = {"part": run, "variant": variant, "tokens": latent[0] * latent[1] * latent[2] // 4}
        row |= time_steps(patched, latent, args)
        if is_gpu(args.device) and variant in broken_down:
            row |= break_down(patched, latent)
        rows.append(row)
        print(f"{run} {variant}: {row['seconds_per_step']:.3f} s per step", flush=True)
    del model, variants, patched
    gc.collect()
    if is_gpu(args.device):
        torch.cuda.empty_cache()
    return rows


def sla2_name(args, ratio):
    return f"SLA2, skips {100 * args.sparsity:g}%, {args.precision}, {ratio} ratio"


def with_sla2(model, args, ratio):
    least = {} if is_gpu(args.device) else {"minimum_tokens": 0}
    chosen = {"sparsity": args.sparsity, "ratio_mode": ratio, "precision": args.precision}
    return install_sla2(model, args.device, **chosen, **least)


def install_sla2(model, device, **settings):
    """The model as the node SLA2 Apply Attention patches it; on a CPU in 16 bit."""
    pack = load_pack().__name__
    hook = importlib.import_module(f"{pack}.nodes.attention.patching")
    values = importlib.import_module(f"{pack}.nodes.settings.values")
    precision = {} if is_gpu(device) else {"precision": "16bit"}
    return hook.install(model, values.AttentionSettings(stop_on_unsupported=True, **settings | precision), None)


def time_steps(model, latent, args):
    """Seconds per step (median, the first left out) and the peak memory of a sampling run, weights included."""
    if is_gpu(args.device):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(args.device)
    out, seconds = sample(model, latent, args.steps + 1)
    if not bool(torch.isfinite(out).all()):
        raise RuntimeError("the sampled latents hold NaN or infinity: these times would mean nothing.")
    row = {"seconds_per_step": statistics.median(seconds[1:]), "seconds": seconds, "first_step_seconds": seconds[0]}
    if is_gpu(args.device):
        row["peak_bytes"] = torch.cuda.max_memory_allocated(args.device)
    hook = model.get_attachment("sla2")
    if hook is not None:
        row["sparse_calls"], row["dense_calls"] = call_counts(hook)
        if not row["sparse_calls"]:
            raise RuntimeError("no call ran sparse: these times would be dense ones.")
    return row


def call_counts(hook):
    layers = hook.runs.finished()[-1].layers.values()
    return sum(layer.sparse for layer in layers), sum(layer.dense.total() for layer in layers)


def break_down(model, latent, steps=2):
    """{"parts": ms per model call by part, "kernels": the costliest ones of a step}."""
    options = model.model_options.setdefault("transformer_options", {})
    with StepParts(model.model.diffusion_model, options) as parts:
        sample(model, latent, steps)
        spent = parts.milliseconds(steps)
    kernels = costliest_kernels(lambda: sample(model, latent, 1))
    return {"parts": spent, "kernels": [{"ms": ms, "launches": n, "name": name[:120]} for ms, n, name in kernels]}


def markdown(rows):
    """The rows of one model as a table, and the parts of a step beside each other."""
    base = rows[0]["seconds_per_step"]
    lines = ["| | s per step | faster | peak memory |", "|---|---|---|---|"]
    for row in rows:
        peak = f"{row['peak_bytes'] / GIB:.1f} GiB" if "peak_bytes" in row else "-"
        lines.append(
            f"| {row['variant']} | {row['seconds_per_step']:.3f} | {base / row['seconds_per_step']:.2f}x | {peak} |"
        )
    broken = [row for row in rows if "parts" in row]
    if broken:
        lines += [
            "",
            "| ms per step | " + " | ".join(row["variant"] for row in broken) + " |",
            "|---" * (len(broken) + 1) + "|",
        ]
        for part in broken[0]["parts"]:
            lines.append(f"| {part} | " + " | ".join(f"{row['parts'][part]:.1f}" for row in broken) + " |")
    for row in broken:
        lines += ["", f"Costliest kernels, {row['variant']}:"]
        lines += [f"    {k['ms']:9.2f} ms {k['launches']:6g} x {k['name']}" for k in row["kernels"]]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
