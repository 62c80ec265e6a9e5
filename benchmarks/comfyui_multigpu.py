"""Time per guided step in ComfyUI on one GPU and on two, by core's node MultiGPU CFG Split: dense and with SLA2.

    python -m benchmarks.comfyui_multigpu --comfyui PATH                        Wan 14B at 720p, random weights
    python -m benchmarks.comfyui_multigpu --comfyui PATH --device cpu --tiny    two devices that are both the CPU

The node gives each half of guidance to a GPU of its own, so two GPUs are all that it can use. Weights are made on the GPU;
SLA2 fits its ratio. A row says what SLA2's report counted, and how far the latents are from one GPU's in the same way.
"""

import argparse
import functools
import json
import statistics
import time
from pathlib import Path

import torch

from tooling.comfyui import find_comfyui

from . import results
from .comfyui_step import comfyui_version, install_sla2
from .measure import environment, is_gpu
from .wan_in_comfyui import LATENTS, SIZES, WanSize, import_comfyui, make_model

GUIDANCE = 3.0
CPUS = torch.device("cpu"), torch.device("cpu", 1)


def main(argv=None):
    args = parse(argv)
    import_comfyui(args.comfyui, args.device)
    rows, latents = [], {}
    content = {"environment": {**environment(args.device), "comfyui": comfyui_version()}, "rows": rows}
    for count in (1, 2):
        for name in ("dense", "SLA2"):
            row, found = measure(args, count, name)
            expected = latents.setdefault(name, found)
            row["error"] = ((found - expected).norm() / expected.norm()).item()
            rows.append(row)
            print(json.dumps(row), flush=True)
            if args.out:
                results.save(args.out, content)
    print(table(rows))


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", default=find_comfyui()[1])
    parser.add_argument("--layers", type=int, default=10, help="of the model's 40")
    parser.add_argument("--steps", type=int, default=3, help="timed steps; one more warms up")
    parser.add_argument("--sparsity", type=float, default=0.97)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a small model")
    parser.add_argument("--out", type=Path, help="results file")
    args = parser.parse_args(argv)
    if is_gpu(args.device) and torch.cuda.device_count() < 2:
        parser.error(f"this compares two GPUs with one, and PyTorch sees {torch.cuda.device_count()}.")
    return args


def measure(args, count, name):
    """(row, latents) of one way on ``count`` GPUs."""
    devices = [torch.device("cuda", i) for i in range(count)] if is_gpu(args.device) else CPUS[:count]
    model = loaded(args, devices[0])
    if name == "SLA2":
        model = install_sla2(model, args.device, sparsity=args.sparsity, ratio_mode="fitted", minimum_tokens=0)
    if count > 1:
        model = split(model, devices)
    if is_gpu(args.device):
        for device in devices:
            torch.cuda.reset_peak_memory_stats(device)
    latents, seconds = guided_sample(model, LATENTS["tiny" if args.tiny else "720p"], args.steps + 1)
    row = {"GPUs": count, "way": name, "seconds_per_step": statistics.median(seconds[1:]), "seconds": seconds}
    row["bytes"] = [torch.cuda.max_memory_allocated(device) for device in devices] if is_gpu(args.device) else None
    if name == "SLA2":
        (*_, record) = model.get_attachment("sla2").runs.finished()
        row["sparse"] = sum(layer.sparse for layer in record.layers.values())
        row["dense"] = sum(layer.dense.total() for layer in record.layers.values())
        row["devices"] = sorted(map(str, record.devices))
        row["attention_error"] = record.attention_error
    unload()
    return row, latents


def loaded(args, device):
    """A model as a loader of ComfyUI leaves it: the node makes the copy for another GPU by loading it again."""
    size = SIZES["tiny"] if args.tiny else WanSize(**{**vars(SIZES["14B"]), "layers": args.layers})
    make = functools.partial(make_model, size, str(device), torch.bfloat16 if is_gpu(device) else torch.float32)
    model = make()
    model.cached_patcher_init = (make, ())
    return model


def split(model, devices):
    """What the node MultiGPU CFG Split does."""
    import comfy.model_management
    from comfy.multigpu import create_multigpu_deepclones

    before = comfy.model_management.get_all_torch_devices
    comfy.model_management.get_all_torch_devices = lambda exclude_current=False: list(devices)
    try:
        return create_multigpu_deepclones(model, len(devices))
    finally:
        comfy.model_management.get_all_torch_devices = before


@torch.inference_mode()
def guided_sample(model, latent, steps):
    """(latents, seconds of each step) of Euler with guidance, as the KSampler node runs it; the first step holds the set-up."""
    import comfy.sample
    import comfy.samplers

    def drawn(seed, *shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    noise, texts = drawn(0, 1, 16, *latent), [0.1 * drawn(seed, 1, 512, 4096) for seed in (1, 2)]
    marks = [time.perf_counter()]

    def callback(step, denoised, x, total):
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        marks.append(time.perf_counter())

    out = comfy.sample.sample_custom(
        model, noise, GUIDANCE, comfy.samplers.sampler_object("euler"), torch.linspace(1, 0.2, steps + 1),
        *([[text, {}]] for text in texts), torch.zeros_like(noise), callback=callback, disable_pbar=True, seed=0,
    )  # fmt: skip
    return out.cpu().float(), [end - begin for begin, end in zip(marks, marks[1:], strict=False)]


def unload():
    import comfy.model_management

    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()


def table(rows):
    lines = [
        "| GPUs | attention | s per step | against one GPU | sparse calls | dense calls | peak GB each | latents against one GPU |",
        "|---" * 8 + "|",
    ]
    one = {row["way"]: row["seconds_per_step"] for row in rows if row["GPUs"] == 1}
    for row in rows:
        memory = "-" if row["bytes"] is None else ", ".join(f"{size / 1e9:.1f}" for size in row["bytes"])
        calls = f"{row['sparse']} | {row['dense']}" if "sparse" in row else "- | -"
        lines.append(
            f"| {row['GPUs']} | {row['way']} | {row['seconds_per_step']:.3f} | "
            f"{one[row['way']] / row['seconds_per_step']:.2f}x | {calls} | {memory} | {row['error']:.1e} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
