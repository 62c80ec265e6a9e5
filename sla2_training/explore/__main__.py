"""python -m sla2_training.explore [--train FILE --held-out FILE] [--steps N] [--studies routers,ratios,...] [--device cuda]

Without files: synthetic layers, to see the tables in a minute on a CPU. Files: see save_captures() and Recorder.
"""

import argparse

import torch

from ..trainer import TrainerOptions
from .captures import load_captures, synthetic_captures
from .studies import STUDIES, run_studies


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", help="captures to train on (safetensors)")
    parser.add_argument("--held-out", help="captures to evaluate on (safetensors)")
    parser.add_argument("--steps", type=int, default=40, help="optimisation steps per layer")
    parser.add_argument("--sparsities", default="0.97,0.95,0.90")
    parser.add_argument("--studies", default=",".join(STUDIES), help="which of: " + ", ".join(STUDIES))
    parser.add_argument("--query-blocks", type=int, default=TrainerOptions.query_blocks)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if bool(args.train) != bool(args.held_out):
        parser.error("--train and --held-out belong together")
    if args.train:
        train, held_out = (load_captures(path, args.device) for path in (args.train, args.held_out))
    else:
        train = synthetic_captures(12, device=args.device)
        held_out = synthetic_captures(3, first_seed=1000, device=args.device)
    run_studies(
        train,
        held_out,
        steps=args.steps,
        sparsities=tuple(float(s) for s in args.sparsities.split(",")),
        options=TrainerOptions(query_blocks=args.query_blocks),
        names=tuple(args.studies.split(",")),
    )


if __name__ == "__main__":
    main()
