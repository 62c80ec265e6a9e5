"""The router experiments of sla2_training.explore on the miniature's own Q, K, V: training and held-out captions apart.

    python -m benchmarks.explore_router --device cuda
    python -m benchmarks.explore_router --random-weights --frames 9 --size 128 --sampling-steps 2 --keep 2 --steps 2

Captures of a few timesteps stay on the device: at 81 frames of 320 x 320 about 13 MB per layer, timestep and video.
"""

import argparse

import torch

from miniature.captions import embed, split_captions
from miniature.sample import load_models, sample_latents
from miniature.wan import WanConfig, WanModel
from sla2_training import TrainerOptions
from sla2_training.explore import Recorder, run_studies
from sla2_training.explore.studies import STUDIES


def capture(model, captions, args, first_seed):
    """Captures of one dense sampling per caption: every n-th call, so that ``--keep`` timesteps of each are kept."""
    shape = (1, 16, (args.frames - 1) // 4 + 1, args.size // 8, args.size // 8)
    grid = (shape[2], shape[3] // 2, shape[4] // 2)
    dtype = torch.bfloat16 if args.device != "cpu" else None
    captures = []
    for number, caption in enumerate(captions):
        recorder = Recorder(grid, every=max(1, args.sampling_steps // args.keep), dtype=dtype)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device != "cpu"):
            sample_latents(
                model, embed(str(caption)), shape=shape, seed=first_seed + number, steps=args.sampling_steps, cfg=1.0,
                device=args.device, attention=recorder,
            )  # fmt: skip
        captures += recorder.captures
    return captures


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--frames", type=int, default=81, help="4n+1")
    parser.add_argument("--size", type=int, default=320, help="height and width, a multiple of 16")
    parser.add_argument("--sampling-steps", type=int, default=30)
    parser.add_argument("--keep", type=int, default=6, help="timesteps kept of each sampling")
    parser.add_argument("--videos", type=int, default=6, help="captions to train on; a third as many are held out")
    parser.add_argument("--steps", type=int, default=120, help="optimisation steps per layer")
    parser.add_argument("--sparsities", default="0.97,0.95,0.90")
    parser.add_argument("--studies", default=",".join(STUDIES))
    parser.add_argument("--random-weights", action="store_true", help="an untrained miniature: to try this script")
    args = parser.parse_args(argv)
    model = WanModel(WanConfig()).to(args.device).eval() if args.random_weights else load_models(device=args.device)[0]
    train_captions, held_out_captions = split_captions()
    step = max(1, len(train_captions) // args.videos)
    train = capture(model, train_captions[::step][: args.videos], args, 0)
    held_out = capture(
        model, held_out_captions[:: 24 // max(1, args.videos // 3)][: max(1, args.videos // 3)], args, 1000
    )
    print(f"{len(train)} captures to train on, {len(held_out)} held out, {train[0].q.shape[2]} tokens")
    run_studies(
        train,
        held_out,
        steps=args.steps,
        sparsities=tuple(float(s) for s in args.sparsities.split(",")),
        options=TrainerOptions(),
        names=tuple(args.studies.split(",")),
    )


if __name__ == "__main__":
    main()
