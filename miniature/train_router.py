"""Stage 1 for the miniature: trains its SLA2 router on the Q, K, V of dense sampling, without ComfyUI.

    python -m miniature.train_router --out weights/wan_miniature_router.safetensors
    python -m miniature.train_router --captures FOLDER --steps 120 --out router.safetensors     on calls that were kept before
    python -m miniature.train_router --tiny --out router.safetensors      a random model of a few tokens, in seconds

Every ``--train-every``-th attention call of a layer trains it for ``--steps-per-call`` steps, then runs dense; when --minutes
are over none does. Nothing is stored: at 32,760 tokens a call's tensors are 50 MB and a step works in 1 GiB. Afterwards held-out captions with other seeds are sampled densely and the hard top-k error of every layer is measured, before and after.
A folder of captures is what benchmarks.explore_router --keep-captures writes: it spares a slow machine the sampling.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch

from sla2_training import RouterTrainer, TrainerOptions

from .captions import embed, split_captions
from .captures import FILES, by_layer, load_captures, model_shape
from .sample import GUIDANCE, SHIFT, WEIGHTS, load_models, sample_latents
from .wan import HEAD_DIM, WanConfig, WanModel, dense_attention

FAMILY = "wan"
TRAIN_SEED, HELD_OUT_SEED = 7000, 9000


class EveryNth:
    """Dense attention that shows every n-th call of each layer to meet(layer, q, k, v), until time.monotonic() is ``until``."""

    def __init__(self, meet, every=1, until=math.inf):
        self.meet, self.every, self.until, self.calls = meet, every, until, {}

    def __call__(self, layer, q, k, v):
        number = self.calls[layer] = self.calls.get(layer, -1) + 1
        if number % self.every == 0 and time.monotonic() < self.until:
            self.meet(layer, q, k, v)
        return dense_attention(layer, q, k, v)


def spread(captions, count):
    """``count`` captions spread evenly over the list."""
    return [str(captions[i * len(captions) // count]) for i in range(count)]


def sample_all(model, captions, first_seed, attention, args, shifts=(SHIFT,)):
    """Samples every caption once, for what the attention function sees; the shifts of the noise levels take turns."""
    shape = (1, 16, (args.frames - 1) // 4 + 1, args.height // 8, args.width // 8)
    options = {"shape": shape, "steps": args.sampling_steps, "cfg": args.cfg, "device": args.device}
    for number, caption in enumerate(captions):
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=not args.float32):
            shift = shifts[number % len(shifts)]
            sample_latents(model, embed(caption), seed=first_seed + number, shift=shift, attention=attention, **options)
        yield number, caption


def make_trainer(shape, args):
    """A RouterTrainer for (layers, heads, head_dim)."""
    options = TrainerOptions(
        seed=args.seed,
        steps_per_observation=args.steps_per_call,
        query_blocks=args.query_blocks,
        learning_rate=args.learning_rate,
        projection_memory=args.projection_memory,
        keep_diagonal=args.keep_diagonal,
    )
    return RouterTrainer(FAMILY, *shape, sparsities=args.sparsities, options=options)


def train_live(model, args):
    """A RouterTrainer that was trained on training captions and measured on held-out ones, while they were sampled."""
    config = model.config
    trainer = make_trainer((config.num_layers, config.num_heads, HEAD_DIM), args)
    train_captions, held_out_captions = split_captions()

    def observe(layer, q, k, v):
        trainer.observe(layer, q, k, v, layout="BNHD")

    def evaluate(layer, q, k, v):
        trainer.evaluate(layer, q, k, v, layout="BNHD")

    until = time.monotonic() + 60 * args.minutes if args.minutes else math.inf
    learning = EveryNth(observe, args.train_every, until)
    captions = spread(train_captions, args.videos)
    for number, caption in sample_all(model, captions, TRAIN_SEED, learning, args, args.shifts):
        say_losses(trainer, f"video {number + 1}, {caption}")
        if time.monotonic() >= until:
            break
    measuring = EveryNth(evaluate, args.evaluate_every)
    for _ in sample_all(model, spread(held_out_captions, args.held_out), HELD_OUT_SEED, measuring, args):
        pass
    return trainer


def train_on_captures(args):
    """A RouterTrainer that was trained and measured on captures, ``args.steps`` steps per layer with new query blocks each."""
    train, held_out = (load_captures(args.captures / name, args.device) for name in FILES)
    trainer = make_trainer(model_shape(train), args)
    layers = by_layer(train)
    for step in range(args.steps):
        for layer, captures in layers.items():
            capture = captures[step % len(captures)]
            trainer.observe(layer, capture.q, capture.k, capture.v, steps=1)
        if step % 10 == 9:
            say_losses(trainer, "captures")
    for capture in held_out:
        trainer.evaluate(capture.layer, capture.q, capture.k, capture.v)
    return trainer


def say_losses(trainer, where):
    loss = " ".join(f"{losses[-1]:.4f}" for _, losses in sorted(trainer.losses.items()))
    print(f"{max(trainer.steps.values())} steps, {where}: loss by layer {loss}", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of the miniature's weights")
    parser.add_argument("--out", type=Path, required=True, help="the router file to write")
    parser.add_argument("--captures", type=Path, help="folder of captures to train on, instead of sampling")
    parser.add_argument("--steps", type=int, default=200, help="optimisation steps per layer on captures")
    parser.add_argument("--query-blocks", type=int, default=TrainerOptions.query_blocks, help="drawn per head and step")
    parser.add_argument("--learning-rate", type=float, default=TrainerOptions.learning_rate)
    parser.add_argument(
        "--projection-memory",
        type=float,
        default=TrainerOptions.projection_memory,
        help="0: the last step's projections",
    )
    parser.add_argument("--sparsities", default="0.99,0.97,0.95,0.90")
    parser.add_argument("--minutes", type=float, help="most that the training takes, measuring not included")
    parser.add_argument("--videos", type=int, default=8, help="training captions, one video each")
    parser.add_argument("--held-out", type=int, default=2, help="held-out captions to measure on, one video each")
    parser.add_argument(
        "--train-every", type=int, default=1, help="train on each n-th model call; odd, to meet both halves of guidance"
    )
    parser.add_argument("--evaluate-every", type=int, default=7, help="measure on each n-th model call of a sampling")
    parser.add_argument("--steps-per-call", type=int, default=1, help="optimisation steps per layer and model call")
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=GUIDANCE)
    parser.add_argument(
        "--shifts", type=float, nargs="+", default=[SHIFT], help="of the noise levels, by training caption in turn"
    )
    parser.add_argument("--frames", type=int, default=81, help="4n+1")
    parser.add_argument("--height", type=int, default=480, help="a multiple of 16")
    parser.add_argument("--width", type=int, default=832, help="a multiple of 16, at least the height")
    parser.add_argument(
        "--keep-diagonal",
        action=argparse.BooleanOptionalAction,
        default=TrainerOptions.keep_diagonal,
        help="every query block always takes its own key blocks",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--float32", action="store_true", help="sample in float32 instead of bfloat16")
    parser.add_argument("--tiny", action="store_true", help="a random model of a few tokens: tries the code")
    args = parser.parse_args(argv)
    args.sparsities = tuple(float(s) for s in args.sparsities.split(","))
    start = time.perf_counter()
    trainer = train_on_captures(args) if args.captures else train_live(_model(args), args)
    trainer.router().save(args.out)
    print(trainer.report().text())
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB, {time.perf_counter() - start:.0f} s in all")


def _model(args):
    if not args.tiny:
        return load_models(args.weights, args.device)[0]
    torch.manual_seed(0)
    args.frames, args.height, args.width, args.sampling_steps, args.videos, args.held_out = 17, 128, 128, 2, 1, 1
    return WanModel(WanConfig(dim=128, ffn_dim=128, num_layers=2)).to(args.device).eval()


if __name__ == "__main__":
    main()
