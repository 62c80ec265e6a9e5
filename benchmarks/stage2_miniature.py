"""The paper's ablation in small: what stage 2 and low-bit training bring, on the trained miniature.

    python -m benchmarks.stage2_miniature --out stage2_out --minutes 6      on one H100
    python -m benchmarks.stage2_miniature --out stage2_out --tiny           random weights on a CPU: a test of the script

Per sparsity: dense, the heuristic router, stage 1, stage 1 and 2 with low-bit training (QAT), stage 2 trained in 16 bit and
then run in 8 bit, and the heuristic router with stage 2. Every run has the same videos, noise and number of steps, which
--minutes sets after a few timed ones. Losses are flow-matching losses on held-out captions, the same at every row.
Writes table.md, results.json, and per run a LoRA and a router file.
"""

import argparse
import copy
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from miniature.captions import embed, split_captions
from miniature.train_dit import encode_clips
from sla2_kernels import default_precision, identity_router, load_router
from sla2_training.stage2 import Stage2Config, Stage2Trainer, Student, VideoLatents, add_lora

from . import results
from .measure import environment, use_device
from .miniature_model import Miniature
from .quality import train_router

NAME = "Wan miniature"
QAT, AFTERWARDS, HEURISTIC = "stage 1 + 2 (QAT)", "stage 1 + 2 in 16 bit, run in 8 bit", "heuristic router + 2 (QAT)"
RUNS = (QAT, AFTERWARDS, HEURISTIC)


def main(argv=None):
    args = parse(argv)
    use_device(args.device)  # accelerate takes the current one
    begin, device = time.monotonic(), torch.device(args.device)
    facts = environment(args.device)
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    miniature = Miniature.tiny(device) if args.tiny else Miniature.load(args.weights, device)
    train, validation = videos(miniature, args.clips, 0), videos(miniature, args.validation_clips, 1)
    print(f"{time.monotonic() - begin:.0f} s: {len(train)} training clips, {len(validation)} held out", flush=True)
    router = load_router(args.router) if args.router else stage_1(args, miniature)
    args.out.mkdir(parents=True, exist_ok=True)
    router.save(args.out / "stage1_router.safetensors")
    print(f"{time.monotonic() - begin:.0f} s: stage 1 done", flush=True)

    runs = [(sparsity, name) for sparsity in args.sparsities for name in RUNS]
    steps, rows = args.steps, []
    for number, (sparsity, name) in enumerate(runs):
        if number == 0 and args.minutes:
            seconds = seconds_per_step(args, miniature, router, train, sparsity)
            # a tenth is left for the validations
            remaining = 0.9 * (60 * args.minutes - (time.monotonic() - begin))
            steps = max(args.least_steps, min(args.steps, int(remaining / len(runs) / seconds)))
            print(f"{seconds:.3f} s per step: {steps} steps per run", flush=True)
        trainer = prepare(args, miniature, router, train, validation, sparsity, name, steps)
        report = trainer.train()
        rows += rows_of(name, sparsity, trainer, report)
        content = {"environment": facts, "steps": steps, "loss": args.loss, "tokens": tokens(miniature), "rows": rows}
        # after each run: one that is cut off keeps what it has
        results.save(args.out / "results.json", content)
        print(f"{time.monotonic() - begin:.0f} s: skips {100 * sparsity:g}% {name}\n{report.table()}", flush=True)
    text = table(rows, args.sparsities)
    (args.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{steps} steps of {args.batch} videos, {args.loss} loss\n{text}")


def stage_1(args, miniature):
    captures = miniature.record("train", prompts=args.prompts, per_video=4)
    return train_router(captures, tuple(args.sparsities), args.observations)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the table, LoRAs and routers")
    parser.add_argument("--weights", type=Path, help="folder of the miniature's weights")
    parser.add_argument("--router", help="router file of stage 1; trained here where left out")
    parser.add_argument(
        "--sparsities", type=lambda text: [float(s) for s in text.split(",")], default=[0.97, 0.95, 0.9]
    )
    parser.add_argument("--minutes", type=float, help="of everything; default: --steps whatever they take")
    parser.add_argument("--steps", type=int, default=400, help="most steps of each run")
    parser.add_argument("--least-steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--loss", choices=("distill", "flow"), default="distill")
    parser.add_argument("--lora-rank", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--ratio-learning-rate", type=float, default=2e-2)
    parser.add_argument("--clips", type=int, default=192, help="training clips, encoded at the start")
    parser.add_argument("--validation-clips", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=6, help="videos sampled for stage 1")
    parser.add_argument("--observations", type=int, default=150, help="stage 1's steps per layer")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(argv)
    if args.tiny:
        args.steps, args.least_steps, args.batch, args.micro_batch, args.clips = 2, 1, 2, 2, 2
        args.validation_clips, args.prompts, args.observations, args.sparsities = 1, 1, 2, args.sparsities[:1]
    return args


def tokens(miniature):
    _, _, frames, height, width = miniature.latent_shape
    return frames * height * width // 4


def videos(miniature, count, split):
    """VideoLatents of rendered clips: split 0 has the training captions, 1 the held-out ones."""
    captions = split_captions()[split]
    chosen = [i * len(captions) // count if count <= len(captions) else i % len(captions) for i in range(count)]
    options = {"size": miniature.size, "batch": 1, "device": miniature.device, "until": float("inf")}
    clips = encode_clips(miniature.vae, captions, chosen, seed=7000 + split, **options)
    context = torch.cat([embed(str(caption)) for caption in captions]).to(miniature.device)
    return VideoLatents(clips.latents, context, clips.caption, torch.zeros_like(context[:1]))


def run(model, noisy, t, context, attend):
    return model(noisy, t * 1000, context, attend)


def prepare(args, miniature, router, train, validation, sparsity, name, steps):
    """The Stage2Trainer of one run."""
    low = "int8" if miniature.device.type == "cpu" else default_precision(miniature.device)
    folder = args.out / f"{100 * sparsity:g}-{RUNS.index(name)}"
    names = ("loss", "batch", "micro_batch", "lora_rank", "learning_rate", "ratio_learning_rate")
    asked = {name: getattr(args, name) for name in names}
    never = {"gradient_checkpointing": False, "checkpoint_every": 10**9, "validate_every": 10**9}
    config = Stage2Config(
        output=str(folder),
        sparsity=sparsity,
        precision="16bit" if name == AFTERWARDS else low,
        steps=steps,
        warmup=min(10, steps),
        lora_alpha=args.lora_rank,
        mixed_precision="bf16" if miniature.device.type == "cuda" else "no",
        validation_levels=miniature.levels,
        **asked,
        **never,
    )
    model = copy.deepcopy(miniature.model).requires_grad_(False)
    add_lora(model, config.lora_rank, config.lora_alpha, config.lora_targets)
    sizes = model.config
    own = identity_router("wan", sizes.num_layers, sizes.num_heads, 128) if name == HEURISTIC else router
    student = Student(model, run, own, sparsity=sparsity, precision=config.precision)
    return Stage2Trainer(config, student, train, validation=validation, model_name=NAME)


def seconds_per_step(args, miniature, router, train, sparsity, count=6):
    """Median time of a step after the first ones, which compile kernels."""
    trainer = prepare(args, miniature, router, train, None, sparsity, QAT, count)
    trainer.config = replace(trainer.config, steps=10**6)
    times = []
    for _ in range(count):
        begin = time.monotonic()
        trainer._forward_backward()
        trainer._update()
        trainer.step += 1
        times.append(time.monotonic() - begin)
    return sorted(times[2:])[len(times[2:]) // 2]


def rows_of(name, sparsity, trainer, report):
    """What one run says: the state before it (stage 1, or the heuristic router), after it, and dense."""

    def row(what, validation, precision):
        found = {"flow": validation.flow, "distance": validation.distance, "dense_flow": report.dense_flow}
        return {"run": what, "sparsity": sparsity, "precision": precision, **found}

    first, last = report.validations[0], report.validations[-1]
    precision = trainer.config.precision
    if name == AFTERWARDS:
        trainer.student.precision = "int8" if trainer.device.type == "cpu" else default_precision(trainer.device)
        trainer.validate()
        return [
            row("stage 1, 16 bit", first, precision),
            row("stage 1 + 2, 16 bit", last, precision),
            row(name, report.validations[-1], trainer.student.precision),
        ]
    before = "stage 1" if name == QAT else "heuristic router"
    return [row(before, first, precision), row(name, last, precision)]


def table(rows, sparsities):
    """Markdown: a row per run, and per sparsity its loss and the share of stage 1's gap to dense that it closes."""
    names = list(dict.fromkeys(row["run"] for row in rows))
    at = {(row["run"], row["sparsity"]): row for row in rows}
    heads = " | ".join(f"skips {100 * s:g}%: loss | distance | gap closed" for s in sparsities)
    lines = [f"| run | {heads} |", "|---" * (1 + 3 * len(sparsities)) + "|"]
    dense = rows[0]["dense_flow"]
    lines.append("| dense | " + " | ".join(f"{dense:.5f} | 0 | " for _ in sparsities) + " |")
    for name in names:
        cells = []
        for sparsity in sparsities:
            row, start = at[name, sparsity], at["stage 1", sparsity]["flow"]
            closed = f"{100 * (start - row['flow']) / (start - dense):.0f}%" if start > dense else ""
            cells.append(f"{row['flow']:.5f} | {row['distance']:.6f} | {closed}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
