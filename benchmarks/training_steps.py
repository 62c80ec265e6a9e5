"""Seconds of a whole stage 2 step, and what of it is attention: in ComfyUI and through accelerate.

    python -m benchmarks.training_steps --comfyui PATH                      both, a few layers of Wan 2.1 1.3B and of 14B
    python -m benchmarks.training_steps --ways accelerate --models 14B --layers 40      all layers of one model
    python -m benchmarks.training_steps --tiny --device cpu                 a test of the script

comfyui: what SLA2 Train LoRA runs, on ComfyUI's own Wan class with bf16 weights. accelerate: Stage2Trainer on diffusers' Wan
transformer with float32 weights under bf16 autocast. Both with random weights at 480p (32,760 tokens), one video a step, every
block recomputed in the backward pass. With the loss "distill" a step also holds the dense model's forward pass, with "flow" not.

Attention "dense": scaled_dot_product_attention, by the backend that torch and ComfyUI choose. "SLA2": int8 forward; of
"distill" the dense model's own attention stays dense. "none": V as it is, dense model included, so that attention's share
of a step is (step - none) / step. Cross-attention is no part of it. Writes benchmarks/results/training-steps-<card>.json.
"""

import argparse
import gc
import importlib
import math
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from miniature.wan import dense_attention
from tooling.comfyui import find_comfyui

from . import results
from .measure import environment, is_gpu, use_device
from .together import SPARSITY
from .wan_in_comfyui import LATENTS, SIZES, import_comfyui, load_pack, make_model

GIB = 2**30
WAYS = ("comfyui", "accelerate")
ATTENTIONS = ("none", "SLA2", "dense")
LAYERS = {"1.3B": 6, "14B": 3}  # of each model by default
WARMUP = 1  # steps that are not timed
RESERVED = 24e9  # bytes for what a step computes in one block
RANK = 32


class Free(torch.autograd.Function):
    """Attention at no cost: V itself, and its gradient as that of Q, K and V, so that all before them have one."""

    @staticmethod
    def forward(ctx, q, k, v):
        return v.view_as(v)

    @staticmethod
    def backward(ctx, grad):
        return grad, grad, grad


def main(argv=None):
    args = parse(argv)
    if "comfyui" in args.ways:
        import_comfyui(args.comfyui, args.device)
    use_device(args.device)
    os.environ["ACCELERATE_USE_CPU"] = str(not is_gpu(args.device)).lower()
    about = {"environment": environment(args.device), "sparsity": SPARSITY, "rank": RANK}
    path = args.out or results.RESULTS / f"training-steps-{results.card_file(about['environment']['card']).name}"
    until = time.monotonic() + 60 * args.minutes
    shown = []
    for name in args.models:
        for way in args.ways:
            part, rows, layers = f"{way} {name} {args.loss}", [], layers_here(way, name, args)
            for attention in ATTENTIONS:
                if time.monotonic() > until:
                    print(f"the minutes are over before {part}, {attention}")
                    print(markdown(shown))
                    return
                row = {"part": part, "way": way, "model": name, "layers": layers, "loss": args.loss}
                rows.append(row | measure(way, name, layers, attention, args))
                results.save(path, results.replace_part(results.load(path), part, rows, about))
                print(f"{part}, {attention}: {rows[-1]['seconds_per_step']:.3f} s per step", flush=True)
                shown.append(rows[-1])
                gc.collect()  # models are in cycles
                if is_gpu(args.device):
                    torch.cuda.empty_cache()
    print(markdown(shown))


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", default=find_comfyui()[1])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--models", nargs="+", choices=list(LAYERS), default=list(LAYERS))
    parser.add_argument("--layers", type=int, help=f"of each model, fewer where they do not fit; default {LAYERS}")
    parser.add_argument("--loss", choices=("distill", "flow"), default="distill")
    parser.add_argument("--steps", type=int, default=3, help="timed steps; one more warms up")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no row begins after so many")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="two layers of a small model")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    if args.tiny:
        args.models, args.layers, args.steps = ["tiny"], 2, 1
    return args


def measure(way, name, layers, attention, args):
    """{attention, seconds_per_step, layers_of_model, tokens, losses, peak_bytes} of one training."""
    if is_gpu(args.device):
        torch.cuda.reset_peak_memory_stats(args.device)
    losses, seconds, tokens = (in_comfyui if way == "comfyui" else by_accelerate)(name, layers, attention, args)
    return {
        "attention": attention,
        "seconds_per_step": seconds,
        "layers_of_model": SIZES[name].layers,
        "tokens": tokens,
        "losses": losses,
        "peak_bytes": torch.cuda.max_memory_allocated(args.device) if is_gpu(args.device) else None,
    }


def layers_here(way, name, args):
    """Layers that are asked for, or as many as fit with their weights and the block inputs that are kept."""
    size = SIZES[name]
    wanted = min(args.layers or LAYERS[name], size.layers)
    if not is_gpu(args.device):
        return wanted
    each = 2 if way == "comfyui" else 4
    layer = each * (8 * size.dim**2 + 2 * size.dim * size.ffn_dim + math.prod(LATENTS["480p"]) // 4 * size.dim)
    return max(1, min(wanted, int((torch.cuda.mem_get_info(args.device)[0] - RESERVED) // layer)))


@torch.no_grad()
def begin_lora(parameters):
    """Begins a LoRA as if it had been trained: gradients of a loss of 0 are all 0, and a GPU multiplies zeros faster."""
    torch.manual_seed(0)
    for parameter in parameters:
        parameter.normal_(0, 0.02)


def precision_of(args):
    return "int8" if is_gpu(args.device) else "16bit"


def in_comfyui(name, layers, attention, args):
    """(losses, seconds per step, tokens) of the training that SLA2 Train LoRA runs."""
    from .several_gpus_training import median_step

    pack = load_pack().__name__
    session, training, families = (
        importlib.import_module(f"{pack}.nodes.{module}")
        for module in ("training.lora_session", "training.lora_training", "attention.model_families")
    )
    training.LEVELS = 1  # the error before and after is not what is measured here
    dtype = torch.bfloat16 if is_gpu(args.device) else torch.float32
    model = make_model(replace(SIZES[name], layers=layers), args.device, dtype)
    # nobody else uses these weights: the training's copy is the model itself
    model.cached_patcher_init = (lambda disable_dynamic: model, ())
    if attention == "none":
        model.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = free_of_charge
    latent = LATENTS["tiny" if args.tiny else "480p"]
    settings = training.LoraSettings(
        steps=WARMUP + args.steps,
        batch=1,
        learning_rate=1e-4,
        optimiser="adamw",
        seed=0,
        loss=args.loss,
        drop_caption=0.0,
    )
    times = []

    def say(headline, losses):
        if len(losses) > len(times):
            if is_gpu(args.device):
                torch.cuda.synchronize(args.device)
            times.append(time.perf_counter())

    plan = session.LoraPlan(SPARSITY, precision_of(args), RANK, settings)
    run = session.LoraSession(model, families.facts_of(model), None, plan, say, lambda: None)
    if attention != "SLA2":
        run.attention._attend = lambda call, layer, below, args, kwargs: below(*args, **kwargs)
        run.attention.sparse_calls = 1  # a training without any would be refused
    begin_lora(run.adapters.parameters())
    generator = torch.Generator().manual_seed(1)
    conditioning = [[0.1 * torch.randn(1, 512, 4096, generator=generator), {}]]
    try:
        run.take_videos(torch.randn(1, 16, *latent, generator=generator), 1)
        run.train(conditioning, conditioning)
        if run.attention.untrained:
            raise RuntimeError(f"calls ran dense: {dict(run.attention.untrained)}; these times would mean nothing.")
        return run.losses, median_step(times, WARMUP), math.prod(latent) // 4
    finally:
        run.close()


def free_of_charge(func, q, k, v, *args, **kwargs):
    """An attention override for ComfyUI: self-attention costs nothing."""
    return Free.apply(q, k, v) if q.shape == k.shape else func(q, k, v, *args, **kwargs)


def free_in_a_student(layer, q, k, v):
    """The same as a Student's attention."""
    return Free.apply(q, k, v)


def by_accelerate(name, layers, attention, args):
    """(losses, seconds per step, tokens) of Stage2Trainer on diffusers' Wan transformer."""
    from sla2_training.stage2 import Stage2Config
    from sla2_training.stage2.student import LORA

    from .several_gpus_training import train, wan

    size = SIZES[name]
    with tempfile.TemporaryDirectory() as folder:
        config = Stage2Config(
            output=folder,
            sparsity=SPARSITY,
            precision=precision_of(args),
            loss=args.loss,
            lora_rank=RANK,
            lora_alpha=RANK,
            mixed_precision="bf16" if is_gpu(args.device) else "no",
            steps=WARMUP + args.steps,
            batch=1,
            validate_every=10**9,
            checkpoint_every=10**9,
        )
        given = argparse.Namespace(layers=layers, tiny=args.tiny, batch=1)
        sizes = {"num_attention_heads": size.heads, "ffn_dim": size.ffn_dim}
        trainer, tokens = wan(given, config, args.device, **sizes)
        begin_lora(p for n, p in trainer.student.named_parameters() if LORA in n)
        if attention != "SLA2":
            trainer.student.attend = dense_attention if attention == "dense" else free_in_a_student
        losses, seconds = train(trainer, args.device, WARMUP)
    return list(losses.values()), seconds, tokens


def markdown(rows):
    """One line per training; attention's share where the step without attention was measured."""
    lines = [
        "| way | model | loss | attention | s per step | against dense | attention's share | peak GiB |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        of_part = {other["attention"]: other["seconds_per_step"] for other in rows if other["part"] == row["part"]}
        seconds = row["seconds_per_step"]
        faster = f"{of_part['dense'] / seconds:.2f}x" if "dense" in of_part else "-"
        model = f"{row['model']}, {row['layers']} of {row['layers_of_model']} layers, {row['tokens']:,} tokens"
        memory = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / GIB:.1f}"
        lines.append(
            f"| {row['way']} | {model} | {row['loss']} | {row['attention']} | {seconds:.3f} | {faster} | "
            f"{1 - of_part['none'] / seconds:.0%} | {memory} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
