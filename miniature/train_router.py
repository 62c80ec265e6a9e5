"""Stage 1 for the miniature: trains its SLA2 router on the live Q, K, V of dense sampling, without ComfyUI.

    python -m miniature.train_router --out weights/wan_miniature_router.safetensors
    python -m miniature.train_router --tiny --out router.safetensors      a random model of a few tokens, in seconds

Every attention call of every sampling step trains its layer for ``--steps-per-call`` steps, then runs dense. Afterwards
held-out captions with other seeds are sampled densely and the hard top-k error of every layer is measured, before and after.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from sla2_training import RouterTrainer, TrainerOptions

from .captions import embed, split_captions
from .sample import WEIGHTS, load_models, sample_latents
from .wan import WanConfig, WanModel, dense_attention

FAMILY = "wan"
TRAIN_SEED, HELD_OUT_SEED = 7000, 9000


class EveryNth:
    """Dense attention that shows every n-th call of each layer to meet(layer, q, k, v)."""

    def __init__(self, meet, every=1):
        self.meet, self.every, self.calls = meet, every, {}

    def __call__(self, layer, q, k, v):
        number = self.calls[layer] = self.calls.get(layer, -1) + 1
        if number % self.every == 0:
            self.meet(layer, q, k, v)
        return dense_attention(layer, q, k, v)


def spread(captions, count):
    """``count`` captions spread evenly over the list."""
    return [str(captions[i * len(captions) // count]) for i in range(count)]


def sample_all(model, captions, first_seed, attention, args):
    """Samples every caption once, for what the attention function sees."""
    shape = (1, 16, (args.frames - 1) // 4 + 1, args.size // 8, args.size // 8)
    for number, caption in enumerate(captions):
        with torch.autocast(args.device, torch.bfloat16, enabled=not args.float32):
            sample_latents(
                model, embed(caption), shape=shape, seed=first_seed + number, steps=args.sampling_steps, cfg=args.cfg,
                device=args.device, attention=attention,
            )  # fmt: skip
        yield number, caption


def train(model, args):
    """A RouterTrainer that was trained on training captions and measured on held-out ones."""
    config = model.config
    trainer = RouterTrainer(
        FAMILY,
        config.num_layers,
        config.num_heads,
        config.dim // config.num_heads,
        sparsities=args.sparsities,
        options=TrainerOptions(seed=args.seed, steps_per_observation=args.steps_per_call),
    )
    train_captions, held_out_captions = split_captions()
    start = time.perf_counter()

    def observe(layer, q, k, v):
        trainer.observe(layer, q, k, v, layout="BNHD")

    def evaluate(layer, q, k, v):
        trainer.evaluate(layer, q, k, v, layout="BNHD")

    learning = EveryNth(observe, args.train_every)
    for number, caption in sample_all(model, spread(train_captions, args.videos), TRAIN_SEED, learning, args):
        loss = " ".join(f"{losses[-1]:.4f}" for _, losses in sorted(trainer.losses.items()))
        steps = max(trainer.steps.values())
        print(f"{time.perf_counter() - start:.0f} s, video {number + 1}, {steps} steps: {caption}: loss {loss}", flush=True)
    measuring = EveryNth(evaluate, args.evaluate_every)
    for _ in sample_all(model, spread(held_out_captions, args.held_out), HELD_OUT_SEED, measuring, args):
        pass
    print(f"{time.perf_counter() - start:.0f} s in all, held-out captions measured")
    return trainer


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of the miniature's weights")
    parser.add_argument("--out", type=Path, required=True, help="the router file to write")
    parser.add_argument("--sparsities", default="0.97,0.95,0.90")
    parser.add_argument("--videos", type=int, default=5, help="training captions, one video each")
    parser.add_argument("--held-out", type=int, default=2, help="held-out captions to measure on, one video each")
    parser.add_argument("--train-every", type=int, default=1, help="train on each n-th model call of a sampling")
    parser.add_argument("--evaluate-every", type=int, default=7, help="measure on each n-th model call of a sampling")
    parser.add_argument("--steps-per-call", type=int, default=1, help="optimisation steps per layer and model call")
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=3.0)
    parser.add_argument("--frames", type=int, default=81, help="4n+1")
    parser.add_argument("--size", type=int, default=320, help="height and width, a multiple of 16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--float32", action="store_true", help="sample in float32 instead of bfloat16")
    parser.add_argument("--tiny", action="store_true", help="a random model of a few tokens: tries the code")
    args = parser.parse_args(argv)
    args.sparsities = tuple(float(s) for s in args.sparsities.split(","))
    if args.tiny:
        torch.manual_seed(0)
        model = WanModel(WanConfig(dim=128, ffn_dim=128, num_layers=2)).to(args.device).eval()
        args.frames, args.size, args.sampling_steps, args.videos, args.held_out = 17, 128, 2, 1, 1
    else:
        model = load_models(args.weights, args.device)[0]
    trainer = train(model, args)
    trainer.router().save(args.out)
    print(trainer.report().text())
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
