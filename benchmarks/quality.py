"""What SLA2 costs in quality, beside its ablations and its peers: on the miniature model, or on any model's Q, K, V.

    python -m benchmarks.quality                                    the miniature, everything, on a GPU
    python -m benchmarks.quality --router router.safetensors        with a router made before (else one is trained here)
    python -m benchmarks.quality --captures held-out.safetensors --train-captures train.safetensors
                                                                    any model: attention output error alone
    python -m benchmarks.quality --captures ... --train-captures ... --miniature
                                                                    the captures are the miniature's: loss and videos too
    python -m benchmarks.quality --tiny                             a random miniature of a few tokens, on a CPU in seconds

Output error: ||out - dense|| / ||dense|| on held-out captions, per layer, and the root mean square over layers. Validation
loss: flow matching, held-out captions. The rivals get the best that their form can give on the training captures: SLA v1's
proj_l (ridge regression) and the heuristic router's ratios (least squares). PSNR and SSIM: the sampled video against the dense one of the same seed. Writes
<out>.json and <out>.md. Captures: safetensors files with tensors "<number>.<layer>.q", ".k", ".v" of shape (B, H, N, D)
after norm and rotation, and metadata grid = "t,h,w" (miniature.captures writes them).
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from miniature.captures import by_layer, load_captures, model_shape
from miniature.images import contact_sheet
from miniature.sample import GUIDANCE
from sla2_kernels.weights import RouterLayer, load_router
from sla2_training import RouterTrainer, TrainerOptions

from . import results
from .measure import environment, use_device
from .miniature_model import Miniature
from .quality_report import layers_markdown, markdown
from .quality_variants import DENSE, STAGE_1, UNTRAINED, fit_v1, make_variants
from .rivals.packages import add_peer_folders
from .router_studies.ratios import collect_rows, fit_constant


def main(argv=None):
    args = parse(argv)
    use_device(args.device)
    add_peer_folders(args.peers)
    torch.manual_seed(0)
    miniature = None
    if args.tiny:
        miniature = Miniature.tiny(args.device)
    elif args.miniature or not args.captures:
        miniature = Miniature.load(
            args.weights, args.device, steps=args.sampling_steps, levels=args.levels, bf16=args.bf16, cfg=args.cfg
        )
    if args.captures:
        train, held_out = (load_captures(path, args.device) for path in (args.train_captures, args.captures))
    else:
        train = miniature.record("train", prompts=args.train_prompts, per_video=args.captures_per_video)
        held_out = miniature.record("held out", prompts=args.prompts, per_video=args.captures_per_video)
    print(
        f"{len(train)} captured calls to train on, {len(held_out)} held out, {held_out[0].q.shape[2]} tokens",
        flush=True,
    )

    stage_1 = load_router(args.router) if args.router else train_router(train, args.sparsities, args.observations)
    if args.save_router:
        stage_1.save(args.save_router)
    few = some_of_each_layer(train, args.fit_captures)
    heuristic = fit_heuristic(train, args.sparsities, stage_1.keep_diagonal)
    variants, absent = make_variants(
        args.sparsities, args.precisions, stage_1, heuristic, fit_v1(by_layer(few), args.sparsities)
    )
    variants = [v for v in variants if not any(v.name.startswith(name) for name in args.leave_out)]
    if args.only:
        variants = [v for v in variants if any(v.name.startswith(name) for name in (DENSE, *args.only))]
    content = {
        "environment": environment(args.device),
        "about": about(args, held_out, miniature),
        "rows": [],
        "absent": absent,
    }
    measure(args, content, variants, held_out, miniature)


def measure(args, content, variants, held_out, miniature):
    """Measures the variants one after another; the files are written anew after each, so that a broken run keeps its rows."""
    expected = dense_outputs(held_out)
    reference, frames = None, {}
    for variant in variants:
        row = {"variant": variant.name, "sparsity": variant.sparsity, "precision": variant.precision}
        try:
            row |= output_errors(variant, held_out, expected)
            if miniature is not None and wants_videos(variant, args):
                row["validation_loss"] = miniature.validation_loss(variant, args.loss_clips or args.prompts)
                videos = miniature.videos(variant, args.prompts)
                reference = videos if variant.name == DENSE else reference
                row |= miniature.likeness(videos, reference)
                frames[variant.name, variant.sparsity] = videos[0]
        except (RuntimeError, ValueError) as error:
            # such as an O(N^2) reference that refuses this size: said in the table
            name = f"{variant.name}, skips {variant.sparsity}"
            content["absent"][name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        content["rows"].append(row)
        print(line(row), flush=True)
        write(args.out, content, args.sparsities)
    if args.sheet:
        shown = [(DENSE, None), *((name, args.video_sparsities[0]) for name in (UNTRAINED, STAGE_1))]
        write_jpeg(args.sheet, contact_sheet([frames[key] for key in shown if key in frames], columns=6))
    print("\n" + markdown(content))


def wants_videos(variant, args):
    """Loss and videos cost whole samplings: of dense, and of the asked variants at the asked sparsities."""
    if variant.name == DENSE:
        return True
    label = f"{variant.name} {variant.precision or ''}"
    named = args.video_variants is None or any(label.startswith(name) for name in args.video_variants)
    return named and variant.sparsity in args.video_sparsities


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="folder of the miniature's weights")
    parser.add_argument("--router", help="router file of stage 1 for this model")
    parser.add_argument("--save-router", help="where to write the router that is trained here")
    parser.add_argument("--captures", help="held-out captures of a model (safetensors)")
    parser.add_argument("--train-captures", help="captures of the same model to train on")
    parser.add_argument("--miniature", action="store_true", help="with --captures: they are the miniature's")
    parser.add_argument("--sparsities", type=numbers)
    parser.add_argument(
        "--precisions", type=lambda text: text.split(","), default=["16bit", "int8", "fp8"], help="of stage 1"
    )
    parser.add_argument("--observations", type=int, default=200, help="training steps per layer")
    parser.add_argument("--prompts", type=int, default=4, help="held-out captions, one video each")
    parser.add_argument("--train-prompts", type=int, default=6)
    parser.add_argument("--captures-per-video", type=int, default=4, help="model calls kept of each sampled video")
    parser.add_argument("--fit-captures", type=int, default=8, help="captures per layer that SLA v1 is fitted to")
    parser.add_argument("--only", type=lambda text: text.split(";"), help="starts of names, between ;, beside dense")
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=GUIDANCE, help="guidance scale; 1 turns guidance off")
    parser.add_argument("--levels", type=int, default=8, help="noise levels of the validation loss")
    parser.add_argument(
        "--loss-clips", type=int, help="clips of the validation loss; as many as prompts where left out"
    )
    parser.add_argument("--video-sparsities", type=numbers, help="sparsities with loss and videos; all where left out")
    parser.add_argument("--video-variants", type=lambda text: text.split(";"), help="starts of names, between ;")
    parser.add_argument("--leave-out", type=lambda text: text.split(";"), default=[], help="starts of names, between ;")
    parser.add_argument("--sheet", type=Path, help="a JPEG: frames of dense, untrained and stage 1, one row each")
    parser.add_argument(
        "--bf16", action="store_true", help="run the model in bfloat16 on a CPU too (a GPU always does)"
    )
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
    args.video_sparsities = args.video_sparsities or args.sparsities
    return args


def numbers(text):
    return [float(part) for part in text.split(",")]


def train_router(captures, sparsities, observations):
    """RouterWeights of stage 1, ``observations`` steps per layer over the captures in turn."""
    layers, heads, head_dim = model_shape(captures)
    trainer = RouterTrainer("wan", layers, heads, head_dim, sparsities=sparsities)
    for layer, of_layer in by_layer(captures).items():
        for step in range(observations):
            capture = of_layer[step % len(of_layer)]
            trainer.observe(layer, capture.q, capture.k, capture.v)
    return trainer.router()


def some_of_each_layer(captures, count):
    """``count`` captures per layer, drawn by seed: a stride would meet the same timestep of every video."""
    generator, chosen = torch.Generator().manual_seed(0), []
    for of_layer in by_layer(captures).values():
        chosen += [of_layer[i] for i in torch.randperm(len(of_layer), generator=generator)[:count].tolist()]
    return chosen


def fit_heuristic(captures, sparsities, keep_diagonal):
    """RouterWeights with identity projections and, per head, the one ratio that fits these captures best (least squares)."""
    layers, heads, head_dim = model_shape(captures)
    options = TrainerOptions(keep_diagonal=keep_diagonal)
    trainer = RouterTrainer("wan", layers, heads, head_dim, sparsities=sparsities, options=options)
    fitted = {}
    for layer, of_layer in by_layer(captures).items():
        ratio = fit_constant(collect_rows(trainer, of_layer)).permute(2, 0, 1)
        fitted[layer] = RouterLayer(None, None, torch.logit(ratio.clamp(0.001, 0.999)).cpu())
    start = trainer.router()
    chosen = tuple(fitted.get(i, layer) for i, layer in enumerate(start.layers))
    return replace(start, layers=chosen)


def dense_outputs(captures):
    """Dense attention of the captures in float32, each (B, N, H, D) on the CPU."""
    with torch.no_grad():
        return [
            F.scaled_dot_product_attention(c.q.float(), c.k.float(), c.v.float()).transpose(1, 2).cpu()
            for c in captures
        ]


@torch.no_grad()
def output_errors(variant, captures, expected):
    """Relative output error against ``expected`` (dense_outputs) per layer and over all layers, and the share of blocks kept."""
    squared, energy = {}, {}
    for capture, wanted in zip(captures, expected, strict=True):
        wanted = wanted.to(capture.q.device)
        q, k, v = (x.transpose(1, 2) for x in (capture.q, capture.k, capture.v))
        out = wanted if variant.name == DENSE else variant(capture.layer, q, k, v)
        difference = out.float() - wanted
        squared[capture.layer] = squared.get(capture.layer, 0.0) + float(difference.square().sum())
        energy[capture.layer] = energy.get(capture.layer, 0.0) + float(wanted.square().sum())
    layers = {layer: (squared[layer] / energy[layer]) ** 0.5 for layer in sorted(squared)}
    overall = (sum(error**2 for error in layers.values()) / len(layers)) ** 0.5
    return {
        "error": overall,
        "error_by_layer": {str(layer): error for layer, error in layers.items()},
        "kept": variant.kept(q, k),
    }


def about(args, held_out, miniature):
    tokens = held_out[0].q.shape[2]
    source = "The miniature model" if miniature else "Captured Q, K, V of a model"
    if args.tiny:
        source = "A random model of a few tokens (a test of the script, not a measurement)"
    trained = (
        f"router from {Path(args.router).name}"
        if args.router
        else f"router trained for {args.observations} steps per layer"
    )
    videos = (
        f" Videos: {args.prompts} held-out captions, {miniature.steps} sampling steps; validation loss: "
        f"{args.loss_clips or args.prompts} clips at {miniature.levels} noise levels."
        if miniature
        else ""
    )
    return (
        f"{source}, {tokens} tokens, {len(held_out)} held-out attention calls; {trained}. Output error, lower is better."
        f"{videos} Measured on: {args.device}."
    )


def line(row):
    skips = "" if row["sparsity"] is None else f"skips {100 * row['sparsity']:g}% "
    more = "".join(f" {key} {row[key]:.4f}" for key in ("validation_loss", "psnr", "ssim") if row.get(key) is not None)
    return f"{skips}{row['variant']} {row['precision'] or ''}: error {row['error']:.4f}{more}"


def write(out, content, sparsities):
    """<out>.json and <out>.md."""
    out = Path(out)
    results.save(out.with_suffix(".json"), content)
    text = markdown(content)
    layers = [layers_markdown(content["rows"], sparsity) for sparsity in sparsities]
    out.with_suffix(".md").write_text("\n\n".join([text, *layers]) + "\n", encoding="utf-8")


def write_jpeg(path, picture):
    """(H, W, 3) uint8 as a JPEG."""
    from PIL import Image

    Image.fromarray(picture.numpy()).save(path, quality=85)


if __name__ == "__main__":
    sys.exit(main())
