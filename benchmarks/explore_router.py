"""The experiments of benchmarks/router_studies on the miniature's own Q, K, V: training and held-out captions apart.

    python -m benchmarks.explore_router --device cuda
    python -m benchmarks.explore_router --device cpu --keep-captures FOLDER --bf16 --studies ""     sample once ...
    python -m benchmarks.explore_router --device cpu --captures FOLDER --studies routers            ... and explore often
    python -m benchmarks.explore_router --tiny --device cpu

At 81 frames of 832 x 480 a captured call is 50 MB in 16 bit; they stay on the device.
"""

import argparse
from pathlib import Path

import torch

from miniature.captures import FILES, load_captures, save_captures
from miniature.sample import GUIDANCE
from sla2_training import TrainerOptions

from .miniature_model import Miniature
from .router_studies.studies import STUDIES, run_studies


def sampled(args):
    """(captures to train on, held-out ones) of dense sampling runs: other captions, other seeds."""
    miniature = (
        Miniature.tiny(args.device)
        if args.tiny
        else Miniature.load(args.weights, args.device, steps=args.sampling_steps, bf16=args.bf16, cfg=args.cfg)
    )
    train = miniature.record("train", prompts=args.videos, per_video=args.keep)
    return train, miniature.record("held out", prompts=args.held_out, per_video=args.keep_held_out or args.keep)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--weights", type=Path, help="folder of the miniature's weights")
    parser.add_argument("--bf16", action="store_true", help="sample in bfloat16 on a CPU too (a GPU always does)")
    parser.add_argument("--keep", type=int, default=4, help="model calls kept of each sampling")
    parser.add_argument("--videos", type=int, default=6, help="captions to train on")
    parser.add_argument("--held-out", type=int, default=2, help="held-out captions to measure on")
    parser.add_argument("--keep-held-out", type=int, help="the same of the held-out ones; as --keep where left out")
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=GUIDANCE, help="guidance scale; 1 turns guidance off")
    parser.add_argument("--keep-captures", type=Path, help="folder for the captures")
    parser.add_argument("--captures", type=Path, help="folder of captures kept before, instead of sampling")
    parser.add_argument("--layers", help="explore these layers only, such as 0,3,5")
    parser.add_argument("--steps", type=int, default=120, help="optimisation steps per layer")
    parser.add_argument("--query-blocks", type=int, default=TrainerOptions.query_blocks, help="drawn per step and head")
    parser.add_argument(
        "--keep-diagonal",
        action=argparse.BooleanOptionalAction,
        default=TrainerOptions.keep_diagonal,
        help="every query block always takes its own key blocks",
    )
    parser.add_argument("--sparsities", default="0.97,0.95,0.90")
    parser.add_argument("--studies", default=",".join(STUDIES))
    parser.add_argument(
        "--frozen", action="store_true", help="draw each capture's query blocks once: faster, more memory"
    )
    parser.add_argument("--tiny", action="store_true", help="a random miniature of a few tokens: tries this script")
    args = parser.parse_args(argv)
    if args.captures:
        train, held_out = (load_captures(args.captures / name, args.device) for name in FILES)
    else:
        train, held_out = sampled(args)
    if args.keep_captures:
        args.keep_captures.mkdir(parents=True, exist_ok=True)
        for name, captures in zip(FILES, (train, held_out), strict=True):
            save_captures(args.keep_captures / name, captures)
    if args.layers:
        chosen = {int(layer) for layer in args.layers.split(",")}
        train, held_out = ([c for c in captures if c.layer in chosen] for captures in (train, held_out))
    print(
        f"{len(train)} captures to train on, {len(held_out)} held out, {train[0].q.shape[2]} tokens; "
        f"{args.steps} steps per layer, {args.query_blocks} query blocks per step and head",
        flush=True,
    )
    run_studies(
        train,
        held_out,
        steps=args.steps,
        sparsities=tuple(float(s) for s in args.sparsities.split(",")),
        options=TrainerOptions(query_blocks=args.query_blocks, keep_diagonal=args.keep_diagonal),
        names=tuple(name for name in args.studies.split(",") if name),
        frozen=args.frozen,
        say=lambda text: print(text, flush=True),
    )


if __name__ == "__main__":
    main()
