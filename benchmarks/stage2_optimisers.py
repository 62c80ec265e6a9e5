"""Which optimiser stage 2 needs: trials of equal seconds on the miniature at 32,760 tokens, by flow matching unless stated.

    python -m benchmarks.stage2_optimisers --router FILE --out trials.json --trials lora64:adamw:7e-4 lora64:muon:2e-3 full:muon:1e-3
        lora64:muon:2e-3:dense lora64:muon:2e-3:distill
    python -m benchmarks.stage2_optimisers --tiny --device cpu --seconds 1 --out trials.json      random weights: a test of the script

A trial is WEIGHTS:OPTIMISER:LEARNING_RATE[:VARIANT]. WEIGHTS: lora64 is a LoRA of rank 64, full all weights of the blocks. Muon
is that of miniature/optim.py for matrices, which orthogonalises all of one shape at a time. VARIANT: "dense" trains the same model
with dense attention, which says how much of a gain is not the sparse attention's; "distill" trains towards the dense model's
velocity instead of the true one. INT8 forward, 16-bit backward, 2 clips a step, compiled blocks; the learning rate rises over 30
steps and falls over the last 40% of the time. A row is judged as those of stage2_miniature.py are, by the better of the last
weights and of their average.
"""

import argparse
import copy
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from miniature.lora import add_lora
from miniature.optim import Average, Muon
from miniature.sample import WEIGHTS
from miniature.train_long import attention_backend
from miniature.wan import dense_attention
from sla2_kernels import identity_router, load_router
from sla2_training.draws import drawn, noise_like
from sla2_training.stage2 import Student

from . import quality_variants as names
from . import results
from .measure import environment, is_gpu, use_device
from .miniature_model import Miniature
from .stage2_miniature import Held, Outliers, compiled_block, run, tokens, videos

RATIO_LEARNING_RATE = 2e-2
WARMUP, UNTIMED = 30, 5  # steps
TRIALS = ("lora64:adamw:7e-4", "lora64:muon:2e-3", "lora64:muon:5e-4", "lora64:muon:4e-3", "full:muon:1e-3", "full:muon:3e-3",
          "full:adamw:3e-4", "lora64:muon:2e-3:dense", "lora64:muon:2e-3:distill")  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """rank: of the LoRA, None trains all weights of the blocks."""

    text: str
    rank: int | None
    optimiser: str
    learning_rate: float
    variant: str

    @classmethod
    def parse(cls, text):
        weights, optimiser, rate, *variant = text.split(":")
        known = weights == "full" or (weights.startswith("lora") and weights[4:].isdigit())
        if not known or optimiser not in ("adamw", "muon") or variant not in ([], ["dense"], ["distill"]):
            raise argparse.ArgumentTypeError(f"{text!r} is not lora64|full:adamw|muon:LEARNING_RATE[:dense|:distill]")
        rank = None if weights == "full" else int(weights[4:])
        return cls(text, rank, optimiser, float(rate), variant[0] if variant else "")


@dataclass(frozen=True)
class Draw:
    """What drawn() asks for."""

    batch: int
    seed: int = 0
    shift: float = 1.0
    drop_caption: float = 0.1


class Run:
    """One trial's model, its optimisers, and a step."""

    def __init__(self, trial, miniature, router, data, args):
        self.trial, self.miniature, self.data, self.draw = trial, miniature, data, Draw(args.batch)
        self.model = copy.deepcopy(miniature.model).requires_grad_(False)
        if trial.rank:
            add_lora(self.model, trial.rank)
        if args.compile:
            self.model.run_block = compiled_block()
        self.student = Student(self.model, run, router, sparsity=args.sparsity, precision="int8").to(miniature.device)
        wanted = ".lora_" if trial.rank else "model.blocks."
        for name, parameter in self.student.named_parameters():
            trains = wanted in name or (name.startswith("ratio_logits") and trial.variant != "dense")
            parameter.requires_grad_(trains)
        if self.student.needs_start:
            with self.miniature._autocast():
                self.student.start_ratios(*self._noisy(0)[:3])
        self.groups = self._optimisers()
        self.trained = torch.nn.ParameterList(p for p in self.student.parameters() if p.requires_grad)
        self.average = Average(self.trained, 0.996)

    def _optimisers(self):
        """(optimiser, learning rate) each."""
        named = [(n, p) for n, p in self.student.named_parameters() if p.requires_grad]
        ratios = [p for n, p in named if n.startswith("ratio_logits")]
        others = [p for n, p in named if not n.startswith("ratio_logits")]
        rate, by_muon = self.trial.learning_rate, self.trial.optimiser == "muon"
        matrices = [p for p in others if by_muon and p.dim() == 2]
        others = [p for p in others if not (by_muon and p.dim() == 2)]
        made = [(Muon(matrices, weight_decay=0.0), rate)] if matrices else []
        for parameters, own in ((others, rate / 3 if by_muon else rate), (ratios, RATIO_LEARNING_RATE)):
            if parameters:
                made.append((torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.0), own))
        return made

    def _noisy(self, step):
        indices, levels, dropped, seeds = drawn(self.draw, step, len(self.data))
        clean, context = self.data.batch(indices, dropped, self.miniature.device)
        noise, t = noise_like(clean, seeds), levels.to(clean.device)
        return torch.lerp(clean, noise, t.view(-1, 1, 1, 1, 1)), t, context, noise - clean

    def velocity(self, noisy, t, context):
        with self.miniature._autocast():
            if self.trial.variant == "dense":
                return run(self.model, noisy, t, context, dense_attention).float()
            return self.student(noisy, t, context).float()

    def step(self, number, progress):
        noisy, t, context, wanted = self._noisy(number)
        if self.trial.variant == "distill":
            with torch.no_grad(), self.miniature._autocast():
                wanted = run(self.miniature.model, noisy, t, context, dense_attention).float()
        loss = (self.velocity(noisy, t, context) - wanted).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        for optimiser, rate in self.groups:
            optimiser.param_groups[0]["lr"] = rate * min(1.0, (number + 1) / WARMUP, (1 - progress) / 0.4)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.average.update()
        return loss.detach()

    def train(self, seconds):
        """(steps, seconds of one)."""
        self.student.train()
        begin, number, progress = None, 0, 0.0
        while progress < 1:
            loss = self.step(number, progress)
            number += 1
            if number == UNTIMED:
                float(loss)  # waits for the compiler and the GPU
                begin = time.monotonic()
            elif begin is not None:
                progress = (time.monotonic() - begin) / seconds
        self.student.eval()
        return number, (time.monotonic() - begin) / max(1, number - UNTIMED)

    @torch.no_grad()
    def judged(self, held):
        """Held.losses() of the last weights or of their average, whichever has less loss."""
        last = held.losses(self.velocity)
        for parameter, value in zip(self.trained, self.average.values, strict=True):
            parameter.copy_(value)
        averaged = held.losses(self.velocity)
        return min(last, averaged, key=lambda found: found["flow"])


def table(rows):
    lines = ["| trial | steps | s per step | loss | times dense's | distance | gap closed |", "|---" * 7 + "|"]
    for row in rows:
        closed = (row["fitted_flow"] - row["flow"]) / (row["fitted_flow"] - row["dense_flow"])
        lines.append(
            f"| {row['trial']} | {row['steps']} | {row['seconds_per_step']:.3f} | {row['flow']:.5f} | "
            f"{row['flow'] / row['dense_flow']:.3f} | {row['distance']:.5f} | {100 * closed:.0f}% |"
        )
    return "\n".join(lines)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="results file; rows it has are kept")
    parser.add_argument("--trials", nargs="+", type=Trial.parse, default=[Trial.parse(text) for text in TRIALS])
    parser.add_argument("--seconds", type=float, default=75.0, help="of each trial's steps")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of the miniature's weights")
    parser.add_argument("--router", help="router file of stage 1; without one the heuristic router")
    parser.add_argument("--sparsity", type=float, default=0.97)
    parser.add_argument("--batch", type=int, default=2, help="clips a step")
    parser.add_argument("--clips", type=int, default=128, help="training clips, encoded at the start")
    parser.add_argument("--validation-clips", type=int, default=4, help="of held-out captions")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    use_device(args.device)
    if is_gpu(args.device):
        torch.backends.cuda.matmul.allow_tf32 = True
    if args.tiny:
        args.clips = args.validation_clips = 2
        miniature = Miniature.tiny(args.device)
    else:
        miniature = replace(Miniature.load(args.weights, args.device, levels=6), size=(81, 480, 832))
    sizes = miniature.model.config
    router = load_router(args.router) if args.router else identity_router("wan", sizes.num_layers, sizes.num_heads, 128)
    content = results.load(args.out) | {"environment": environment(args.device), "seconds": args.seconds}
    with attention_backend("cudnn", torch.device(args.device)):
        data, held = (
            videos(miniature, args.clips, 0),
            Held(miniature, videos(miniature, args.validation_clips, 1), Outliers()),
        )
        fitted = held.losses(held.velocity(names.fitted(args.sparsity, "int8", query_block=router.q_block)))["flow"]
        print(
            f"{len(data)} clips of {tokens(miniature)} tokens, loss dense {held.dense_flow:.5f}, fitted {fitted:.5f}",
            flush=True,
        )
        for trial in args.trials:
            work = Run(trial, miniature, router, data, args)
            steps, seconds = work.train(args.seconds)
            row = {"trial": trial.text, "steps": steps, "seconds_per_step": seconds, **work.judged(held),
                   "dense_flow": held.dense_flow, "fitted_flow": fitted}  # fmt: skip
            content["rows"].append(row)
            results.save(args.out, content)
            print(table([row]).splitlines()[-1], flush=True)
            del work
    print(table(content["rows"]))


if __name__ == "__main__":
    sys.exit(main())
