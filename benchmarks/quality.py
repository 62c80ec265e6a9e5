"""What SLA2 costs in quality, beside its ablations and its peers: on the miniature model, or on any model's Q, K, V.

    python -m benchmarks.quality                                    the miniature, everything, on a GPU
    python -m benchmarks.quality --router router.safetensors        with a router made before (else one is trained here)
    python -m benchmarks.quality --captures held-out.safetensors --train-captures train.safetensors
                                                                    any model: attention output error alone
    python -m benchmarks.quality --tiny                             a random miniature of a few tokens, on a CPU in seconds

Output error: ||out - dense|| / ||dense|| on held-out captions, per layer, and the root mean square over layers. Validation
loss: flow matching, held-out captions. PSNR and SSIM: the sampled video against the dense one of the same seed. Writes
<out>.json and <out>.md. Captures: safetensors files with tensors "<number>.<layer>.q", ".k", ".v" of shape (B, H, N, D)
after norm and rotation, and metadata grid = "t,h,w" (sla2_training.explore.captures writes them).
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from sla2_kernels.weights import load_router
from sla2_training import RouterTrainer, TrainerOptions
from sla2_training.explore.captures import by_layer, load_captures, model_shape

from . import results
from .measure import environment
from .miniature_model import Miniature
from .peers import add_peer_folders
from .quality_report import layers_markdown, markdown
from .quality_variants import DENSE, fit_v1, make_variants


def main(argv=None):
    args = parse(argv)
    add_peer_folders(args.peers)
    torch.manual_seed(0)
    miniature = None
    if args.captures:
        train, held_out = (load_captures(path, args.device) for path in (args.train_captures, args.captures))
    else:
        miniature = Miniature.tiny(args.device) if args.tiny else Miniature.load(args.weights, args.device)
        train = miniature.record("train", prompts=args.train_prompts, per_video=args.captures_per_video)
        held_out = miniature.record("held out", prompts=args.prompts, per_video=args.captures_per_video)
    print(
        f"{len(train)} captured calls to train on, {len(held_out)} held out, {held_out[0].q.shape[2]} tokens",
        flush=True,
    )

    stage_1 = load_router(args.router) if args.router else train_router(train, args.sparsities, args.observations)
    if args.save_router:
        stage_1.save(args.save_router)
    heuristic = train_router(train, args.sparsities, args.observations, learning_rate=0.0)
    projections = fit_v1(by_layer(train), args.sparsities)
    variants, absent = make_variants(args.sparsities, args.precisions, stage_1, heuristic, projections)

    rows, reference = [], None
    for variant in variants:
        row = {"variant": variant.name, "sparsity": variant.sparsity, "precision": variant.precision}
        try:
            row |= output_errors(variant, held_out)
            if miniature is not None:
                row["validation_loss"] = miniature.validation_loss(variant, args.prompts)
                videos = miniature.videos(variant, args.prompts)
                reference = videos if variant.name == DENSE else reference
                row |= miniature.likeness(videos, reference)
        except (RuntimeError, ValueError) as error:
            # such as an O(N^2) reference that refuses this size: said in the table
            absent[f"{variant.name}, skips {variant.sparsity}"] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        rows.append(row)
        print(line(row), flush=True)
    content = {
        "environment": environment(args.device),
        "about": about(args, held_out),
        "rows": rows,
        "absent": absent,
    }
    write(args.out, content, args.sparsities)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="folder of the miniature's weights")
    parser.add_argument("--router", help="router file of stage 1 for this model")
    parser.add_argument("--save-router", help="where to write the router that is trained here")
    parser.add_argument("--captures", help="held-out captures of a model (safetensors)")
    parser.add_argument("--train-captures", help="captures of the same model to train on")
    parser.add_argument("--sparsities", type=lambda text: [float(s) for s in text.split(",")])
    parser.add_argument(
        "--precisions", type=lambda text: text.split(","), default=["16bit", "int8", "fp8"], help="of stage 1"
    )
    parser.add_argument("--observations", type=int, default=200, help="training steps per layer")
    parser.add_argument("--prompts", type=int, default=4, help="held-out captions, one video each")
    parser.add_argument("--train-prompts", type=int, default=6)
    parser.add_argument("--captures-per-video", type=int, default=4, help="model calls kept of each sampled video")
    parser.add_argument("--peers", help="folder with comfy-kitchen, for sol_attn")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=results.RESULTS / "quality")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(argv)
    if bool(args.captures) != bool(args.train_captures):
        parser.error("--captures and --train-captures belong together")
    if args.tiny:
        args.prompts, args.train_prompts, args.captures_per_video, args.observations = 1, 1, 1, 3
        args.sparsities, args.precisions = args.sparsities or [0.6], ["16bit", "int8"]
    args.sparsities = args.sparsities or [0.85, 0.9, 0.95, 0.97]
    return args


def train_router(captures, sparsities, observations, **options):
    """RouterWeights of stage 1, ``observations`` steps per layer over the captures in turn; learning_rate=0 keeps the
    projections at the identity and trains the ratios alone."""
    layers, heads, head_dim = model_shape(captures)
    trainer = RouterTrainer("wan", layers, heads, head_dim, sparsities=sparsities, options=TrainerOptions(**options))
    for layer, of_layer in by_layer(captures).items():
        for step in range(observations):
            capture = of_layer[step % len(of_layer)]
            trainer.observe(layer, capture.q, capture.k, capture.v)
    return trainer.router()


@torch.no_grad()
def output_errors(variant, captures):
    """Relative output error against dense attention per layer and over all layers, and the share of blocks kept."""
    squared, energy = {}, {}
    for capture in captures:
        expected = F.scaled_dot_product_attention(capture.q, capture.k, capture.v).transpose(1, 2).double()
        q, k, v = (x.transpose(1, 2) for x in (capture.q, capture.k, capture.v))
        out = variant(capture.layer, q, k, v).double()
        squared[capture.layer] = squared.get(capture.layer, 0.0) + float((out - expected).square().sum())
        energy[capture.layer] = energy.get(capture.layer, 0.0) + float(expected.square().sum())
    layers = {layer: (squared[layer] / energy[layer]) ** 0.5 for layer in sorted(squared)}
    overall = (sum(error**2 for error in layers.values()) / len(layers)) ** 0.5
    return {
        "error": overall,
        "error_by_layer": {str(layer): error for layer, error in layers.items()},
        "kept": variant.kept(q, k),
    }


def about(args, held_out):
    tokens = held_out[0].q.shape[2]
    source = "Captured Q, K, V of a model" if args.captures else "The miniature model"
    if args.tiny:
        source = "A random model of a few tokens (a test of the script, not a measurement)"
    trained = (
        f"router from {Path(args.router).name}"
        if args.router
        else f"router trained for {args.observations} steps per layer"
    )
    return f"{source}, {tokens} tokens, {len(held_out)} held-out attention calls; {trained}. Output error, lower is better."


def line(row):
    skips = "" if row["sparsity"] is None else f"skips {100 * row['sparsity']:g}% "
    more = "".join(f" {key} {row[key]:.4f}" for key in ("validation_loss", "psnr", "ssim") if row.get(key) is not None)
    return f"{skips}{row['variant']} {row['precision'] or ''}: error {row['error']:.4f}{more}"


def write(out, content, sparsities):
    """<out>.json and <out>.md; prints the table."""
    out = Path(out)
    results.save(out.with_suffix(".json"), content)
    text = markdown(content)
    layers = [layers_markdown(content["rows"], sparsity) for sparsity in sparsities]
    out.with_suffix(".md").write_text("\n\n".join([text, *layers]) + "\n", encoding="utf-8")
    print("\n" + text)


if __name__ == "__main__":
    sys.exit(main())
