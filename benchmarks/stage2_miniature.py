"""What stage 2 and low-bit training bring, on the trained miniature at real length: 81 frames of 832 x 480, 32,760 tokens.

    python -m benchmarks.stage2_miniature --weights FOLDER --router FILE --out FOLDER --sparsities 0.97,0.99 --minutes 6
    python -m benchmarks.stage2_miniature --weights FOLDER --out FOLDER --sparsities 0.97 --heuristic --steps 120 --outliers k:8:30 none
        --trained 16bit "int8 plain" fp8 int8 --minutes 6            low-bit training where rounding costs something
    python -m benchmarks.stage2_miniature --out FOLDER --tiny --device cpu       random weights: a test of the script

A run trains a LoRA and the mixing ratios for one sparsity, its forward pass in one format: "int8", as shipped, "int8 plain",
which leaves out the balance of channels (quantization.py) as the paper's scheme does, "fp8" or "16bit". Every run has the same
clips, noise and number of steps. All are judged on the same held-out clips and noise, in each format that is asked for:
flow-matching loss, and distance to the velocity of the model run dense. "Gap closed" is of the loss between dense and the
untrained mode with a ratio fitted in every call, in the same format.
--outliers k:8:30 multiplies 8 channels of K by 30 and divides Q's by as much in every self-attention call, dense ones too (as
int8_outliers does): no logit changes, and the linear branch does. Such runs take the heuristic router. "int8" multiplies P V in
FP8 on Hopper; --arch 89 runs what an RTX 40 would, where P V is in INT8.

Writes results.json and table.md after each run, and per run a LoRA and a router file in a folder of its own. --minutes ends
a call of this script: the run at work is saved, and the same command goes on with it.

--start begins with the LoRA and the ratios of an earlier run, in its folder.

--guided and --few-lora train the model as it is sampled too, in turns with --loss (sla2_training/stage2/ways.py), at noise levels
of sampling with --sampling-shift.

On one H200 a step of 2 clips by Muon and the mixed loss takes 0.174 s and 10.4 GiB with compiled blocks.
"""

import argparse
import copy
import gc
import importlib
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from miniature.captions import embed, split_captions
from miniature.optim import Muon
from miniature.pool import fill_pool
from miniature.sample import SHIFT, WEIGHTS
from miniature.train_long import attention_backend
from miniature.wan import WanBlock
from sla2_kernels import identity_router, load_router
from sla2_training.draws import noise_like
from sla2_training.losses import LOSSES
from sla2_training.optimisers import OPTIMISERS
from sla2_training.stage2 import Stage2Config, Stage2Trainer, Student, VideoLatents, add_lora
from sla2_training.stage2.config import STATES
from sla2_training.stage2.lora import check_lora_file, place_in_file

from . import quality_variants as names
from . import results
from .consumer_imitation import ASSEMBLED, imitate
from .int8_outliers import with_gains
from .measure import environment, use_device
from .miniature_model import Miniature

NAME = "Wan miniature"
FORMATS = ("int8", "int8 plain", "fp8", "16bit")
FITTED, BEFORE = "untrained, fitted ratio", "before stage 2"
AFTER = "stage 2"
KEPT_EQUAL = (
    "loss", "steps", "batch", "lora_rank", "optimiser", "learning_rate", "ratio_learning_rate", "shift", "drop_caption", "knots", "clips",
    "validation_clips", "levels", "frames", "height", "width", "heuristic", "arch", "start", "guided", "few_lora", "few_states", "sampling_steps",
    "sampling_shift",
)  # fmt: skip


@dataclass(frozen=True)
class Outliers:
    """Gains in every self-attention call, as int8_outliers.with_gains; side None: none."""

    side: str | None = None
    channels: int = 0
    gain: float = 1.0

    @classmethod
    def parse(cls, text):
        if text == "none":
            return cls()
        side, *numbers = text.split(":")
        if side not in ("q", "k", "both") or len(numbers) != 2:
            raise argparse.ArgumentTypeError(f"{text!r} is neither none nor SIDE:CHANNELS:GAIN, such as k:8:30")
        return cls(side, int(numbers[0]), float(numbers[1]))

    def __str__(self):
        return f"{self.side}:{self.channels}:{self.gain:g}" if self.side else "none"

    def __call__(self, attend):
        """``attend`` (layer, q, k, v) on tensors with these gains."""
        if self.side is None:
            return attend
        return lambda layer, q, k, v: attend(layer, *with_gains(q, k, self.side, self.channels, self.gain), v)


@dataclass(frozen=True)
class Job:
    """A training run. trained: the format of its forward pass."""

    sparsity: float
    trained: str
    outliers: Outliers

    @property
    def folder(self):
        return f"{100 * self.sparsity:g}-{self.trained}-{self.outliers}".replace(" ", "-").replace(":", "-")


class TimeIsUp(Exception):
    """The minutes are over; the run was saved."""


class TimedTrainer(Stage2Trainer):
    """Stops before a step when ``until`` (time.monotonic()) has passed, and saves what it has."""

    until = float("inf")

    def _forward_backward(self):
        if time.monotonic() > self.until:
            self._save()
            raise TimeIsUp
        return super()._forward_backward()


@contextmanager
def unbalanced():
    """While open, INT8 rounds Q and K as they are: no channel is balanced between them.

    In every copy of the package in this process: the registered operator may be another's than this module's.
    """
    before = []

    def put(module, name, value):
        before.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    def without(pools):
        def made(*args, **options):
            found = pools(*args, **options)
            if found.balance is not None:
                found.balance.fill_(1.0)
            return found

        return made

    for copied in [name.removesuffix("operators") for name in sys.modules if name.endswith("sla2_kernels.operators")]:
        kernels, launch, rounding = (
            importlib.import_module(copied + name) for name in ("triton_backend", "kernels.launch", "quantization")
        )
        put(kernels, "pools", without(kernels.pools))
        # a replayed call would leave out what is not a kernel of ours
        put(launch, "DIRECT", False)
        put(rounding, "balance", lambda q, k: torch.ones(q.shape[1], dtype=q.dtype, device=q.device))
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def running(form):
    """Context in which an operator called with precision_of(form) runs in this one of FORMATS."""
    return unbalanced() if form == "int8 plain" else nullcontext()


def precision_of(form):
    return form.split()[0]


class Held:
    """Held-out clips at even noise levels with the dense model's velocities, to judge others by."""

    @torch.no_grad()
    def __init__(self, miniature, data, outliers):
        self.miniature, self.outliers, self.items = miniature, outliers, []
        for video in range(len(data)):
            clean, context = data.batch(torch.tensor([video]), torch.tensor([False]), miniature.device)
            noise = noise_like(clean, [1000 + video])
            for level in range(miniature.levels):
                t = torch.full((1,), (level + 0.5) / miniature.levels, device=miniature.device)
                noisy = torch.lerp(clean, noise, t.view(-1, 1, 1, 1, 1))
                self.items.append((noisy, t, context, noise - clean))
        self.dense = [self.velocity(names.dense)(*item[:3]) for item in self.items]
        pairs = zip(self.dense, self.items, strict=True)
        self.dense_flow = sum(_square(dense, item[3]) for dense, item in pairs) / len(self.items)

    def velocity(self, attend):
        """The model's own velocity with another attention."""
        attend = self.outliers(attend)

        def velocity(noisy, t, context):
            with self.miniature._autocast():
                return self.miniature.model(noisy, t * 1000, context, attend).float()

        return velocity

    @torch.no_grad()
    def losses(self, velocity):
        """{"flow", "distance"}: mean squared errors to the true velocity and to the dense model's; the latter by level too."""
        flow, by_level = 0.0, {}
        for (noisy, t, context, wanted), dense in zip(self.items, self.dense, strict=True):
            own = velocity(noisy, t, context)
            flow += _square(own, wanted)
            by_level.setdefault(f"{t.item():.3f}", []).append(_square(own, dense))
        means = {level: sum(found) / len(found) for level, found in by_level.items()}
        return {
            "flow": flow / len(self.items),
            "distance": sum(means.values()) / len(means),
            "distance_by_level": means,
        }


def _square(a, b):
    return F.mse_loss(a, b).item()


class Study:
    """What all runs share, and results.json."""

    def __init__(self, args):
        self.args, self.begin, self.device = args, time.monotonic(), torch.device(args.device)
        self.until = self.begin + 60 * args.minutes if args.minutes else float("inf")
        self.content = self._started()
        if args.tiny:
            self.miniature = replace(Miniature.tiny(self.device), levels=args.levels)
        else:
            size = args.frames, args.height, args.width
            self.miniature = replace(Miniature.load(args.weights, self.device, levels=args.levels), size=size)
        sizes = self.miniature.model.config
        self.heuristic = identity_router("wan", sizes.num_layers, sizes.num_heads, 128)
        self.router = load_router(args.router) if args.router else self.heuristic
        self.train = videos(self.miniature, args.clips, 0)
        self.validation = videos(self.miniature, args.validation_clips, 1)
        self.held = {}
        self.say(f"{len(self.train)} training clips, {len(self.validation)} held out, {tokens(self.miniature)} tokens")

    def _started(self):
        """Raises ValueError where the folder has rows of other settings."""
        settings = {name: getattr(self.args, name) for name in KEPT_EQUAL}
        content = results.load(self.path)
        for name, value in content.get("settings", {}).items():
            if settings[name] != value:
                raise ValueError(
                    f"{self.path} has rows with {name} {value}, and this run has {settings[name]}: give another --out."
                )
        return content | {"settings": settings, "environment": environment(self.args.device)}

    @property
    def path(self):
        return self.args.out / "results.json"

    def say(self, text):
        print(f"{time.monotonic() - self.begin:4.0f} s  {text}", flush=True)

    def keep(self, row):
        self.content["rows"].append(row)
        results.save(self.path, self.content)
        self.say(line(row))

    def has(self, **facts):
        return any(all(row[key] == value for key, value in facts.items()) for row in self.content["rows"])

    def judge(self, outliers):
        if outliers not in self.held:
            self.held = {outliers: Held(self.miniature, self.validation, outliers)}
        return self.held[outliers]

    def router_of(self, outliers):
        """(its name in the rows, RouterWeights): a trained router does not know channels with gains."""
        if self.args.heuristic or outliers.side or not self.args.router:
            return "heuristic", self.heuristic
        return "stage 1", self.router

    def trainer(self, job):
        args, model = self.args, copy.deepcopy(self.miniature.model).requires_grad_(False)
        copied = (
            "loss", "steps", "batch", "micro_batch", "lora_rank", "optimiser", "learning_rate", "ratio_learning_rate", "shift",
            "drop_caption",
        )  # fmt: skip
        config = Stage2Config(
            output=str(args.out / job.folder), sparsity=job.sparsity, precision=precision_of(job.trained),
            lora_alpha=args.lora_rank, warmup=min(20, args.steps), checkpoint_every=200, validate_every=10**9,
            mixed_precision="bf16" if self.device.type == "cuda" else "no", gradient_checkpointing=False,
            **of_sampling(args), **{name: getattr(args, name) for name in copied},
        )  # fmt: skip
        add_lora(model, config.lora_rank, config.lora_alpha, config.lora_targets)
        if args.compile:
            model.run_block = compiled_block()
        if args.start:
            put_lora(model, Path(args.start) / "lora.safetensors")
            router = load_router(Path(args.start) / "router.safetensors")
        else:
            router = with_knots(self.router_of(job.outliers)[1], args.knots)

        def run_with_gains(model, noisy, t, context, attend):
            return run(model, noisy, t, context, job.outliers(attend))

        student = Student(model, run_with_gains, router, sparsity=job.sparsity, precision=config.precision)
        trainer = TimedTrainer(config, student, self.train, model_name=NAME, say=self.say)
        trainer.until = self.until
        if args.optimiser == "muon":
            trainer.optimisers = at_once(*trainer.optimisers)
        return trainer

    def run(self, job):
        """Trains and judges a job, or goes on with it. Raises TimeIsUp."""
        facts = {"sparsity": job.sparsity, "outliers": str(job.outliers)}
        if self.has(run=AFTER, trained=job.trained, **facts):
            return
        if time.monotonic() > self.until:
            raise TimeIsUp
        held, formats = self.judge(job.outliers), list(dict.fromkeys([job.trained, *self.args.evaluated]))
        for form in formats:
            if not self.has(run=FITTED, evaluated=form, **facts):
                block = self.router_of(job.outliers)[1].q_block  # the student's: the node takes 64 on Hopper
                with running(form):
                    untrained = names.fitted(job.sparsity, precision_of(form), query_block=block)
                    found = held.losses(held.velocity(untrained))
                self.keep({"run": FITTED, "trained": None, "evaluated": form, "router": "heuristic", **facts, **found,
                           "dense_flow": held.dense_flow})  # fmt: skip
        with running(job.trained):
            trainer = self.trainer(job)
        self._judge_student(trainer, BEFORE, None, formats, held, job)
        begin, first = time.monotonic(), len(trainer.report.losses)
        with running(job.trained):
            trainer.train(resume=True)
        steps = len(trainer.report.losses) - first
        self.say(f"{(time.monotonic() - begin) / max(1, steps):.3f} s per step, {peak_gib(self.device)}")
        self._judge_student(trainer, AFTER, job.trained, formats, held, job)
        (self.args.out / "table.md").write_text(table(self.content["rows"]) + "\n", encoding="utf-8")

    def _judge_student(self, trainer, what, trained, formats, held, job):
        facts = {"run": what, "trained": trained, "sparsity": job.sparsity, "outliers": str(job.outliers)}
        trainer.wrapped.eval()
        for form in formats:
            if self.has(evaluated=form, **facts):
                continue
            trainer.student.precision = precision_of(form)
            with running(form):
                found = held.losses(trainer._velocity)
            router = self.router_of(job.outliers)[0]
            self.keep({**facts, "evaluated": form, "router": router, **found, "dense_flow": held.dense_flow})
        trainer.student.precision = precision_of(job.trained)


def compiled_block():
    """A WanBlock's call whose parts before and after self-attention are compiled, for WanModel.run_block."""
    before, after = (
        torch.compile(part, dynamic=False) for part in (WanBlock.before_attention, WanBlock.after_attention)
    )

    def call(block, x, modulation, rope, context, layer, attention):
        modulation = block.modulation + modulation
        q, k, v = before(block, x, modulation, rope)
        return after(block, x, modulation, attention(layer, q, k, v), context)

    return call


@torch.no_grad()
def put_lora(model, path):
    """Gives the adapters of ``model`` the values of a file that save_lora() wrote; ValueError where they are others.

    A file of a smaller rank takes the first ones.
    """
    tensors = load_file(path)
    for layer in {key.rsplit(".lora_", 1)[0] for key in tensors if ".lora_" in key}:
        up, down, alpha = (tensors.get(f"{layer}.{part}") for part in ("lora_up.weight", "lora_down.weight", "alpha"))
        if up is None or down is None or up.shape[1] != len(down):
            raise ValueError(f"{path} has factors of unlike ranks for {layer}.")
        if alpha is not None:
            tensors[f"{layer}.lora_up.weight"] = up.float() * (float(alpha) / len(down))
    for name, parameter in model.named_parameters():
        if place := place_in_file(name):
            layer, kind = place
            value = tensors.get(f"{layer}.{kind}.weight")
            side = int(kind == "lora_up")  # the dimension of the rank
            if value is not None and value.shape[side] < parameter.shape[side]:
                # what goes up begins with zeros: the others add nothing yet
                rest = parameter.split([value.shape[side], parameter.shape[side] - value.shape[side]], side)[1]
                value = torch.cat([value.to(parameter), rest], side)
            if value is None or value.shape != parameter.shape:
                got = "none" if value is None else tuple(value.shape)
                raise ValueError(
                    f"{path} has {got} where the LoRA of {layer} has {tuple(parameter.shape)}: give the --lora-rank of that run."
                )
            parameter.copy_(value)


def at_once(muon, *others):
    """The optimisers with miniature/optim.py's Muon in the place of torch's, which takes matrices one by one: 0.1 s a step more."""
    return Muon(muon.param_groups), *others


def with_knots(router, knots):
    """``router`` with so many ratio knots along the query axis, where it has one; ValueError where it has another number."""
    if knots == 1 or router.layers[0].alpha_logits is None:
        return router
    if router.layers[0].alpha_logits.shape[2] != 1:
        raise ValueError(f"--knots {knots}: this router has {router.layers[0].alpha_logits.shape[2]} already.")
    expanded = (layer.alpha_logits.expand(-1, -1, knots).contiguous() for layer in router.layers)
    pairs = zip(router.layers, expanded, strict=True)
    return replace(router, layers=tuple(replace(layer, alpha_logits=logits) for layer, logits in pairs))


def peak_gib(device):
    return f"peak {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB" if device.type == "cuda" else "on the CPU"


def tokens(miniature):
    _, _, frames, height, width = miniature.latent_shape
    return frames * height * width // 4


def videos(miniature, count, split):
    """VideoLatents of rendered clips: split 0 has the training captions, 1 the held-out ones."""
    captions = split_captions()[split]
    chosen = [i * len(captions) // count if count <= len(captions) else i % len(captions) for i in range(count)]
    clips = fill_pool(miniature.vae, captions, chosen, size=miniature.size, seed=7000 + split, device=miniature.device)
    context = torch.cat([embed(str(caption)) for caption in captions]).to(miniature.device)
    return VideoLatents(clips.latents, context, clips.caption, torch.zeros_like(context[:1]))


def run(model, noisy, t, context, attend):
    return model(noisy, t * 1000, context, attend)


def line(row):
    made = f"trained in {row['trained']}, " if row["trained"] else ""
    return (
        f"skips {100 * row['sparsity']:g}%, outliers {row['outliers']}, {row['run']}: {made}run in {row['evaluated']}: "
        f"loss {row['flow']:.5f} (dense {row['dense_flow']:.5f}), distance {row['distance']:.6f}, by noise level "
        + ", ".join(f"{level}: {distance:.5f}" for level, distance in row["distance_by_level"].items())
    )


def closed(rows, row):
    """Share of the loss gap between the fitted ratio, in the same format, and dense that a row closes; None without a gap."""
    same = ("sparsity", "outliers", "evaluated")
    (start,) = [r["flow"] for r in rows if r["run"] == FITTED and all(r[key] == row[key] for key in same)]
    gap = start - row["dense_flow"]
    return (start - row["flow"]) / gap if gap > 0 else None


def table(rows):
    """Markdown: per sparsity and outliers, every run and format."""
    lines = [
        "| skips | outliers | run | router | trained in | run in | loss | times dense's | distance | gap closed |",
        "|---" * 10 + "|",
    ]
    order = {FITTED: 0, BEFORE: 1, AFTER: 2}
    for row in sorted(rows, key=lambda row: (-row["sparsity"], row["outliers"], order[row["run"]], row["evaluated"])):
        share = closed(rows, row)
        lines.append(
            f"| {100 * row['sparsity']:g}% | {row['outliers']} | {row['run']} | {row['router']} | {row['trained'] or '-'} | {row['evaluated']} | "
            f"{row['flow']:.5f} | {row['flow'] / row['dense_flow']:.3f} | {row['distance']:.6f} | {'-' if share is None else f'{100 * share:.0f}%'} |"
        )
    return "\n".join(lines)


def of_sampling(args):
    """Settings of Stage2Config that say how the model is sampled."""
    return {
        "guidance": args.guided, "few_step_loras": dict(args.few_lora), "few_step_states": args.few_states,
        "sampling_steps": args.sampling_steps, "sampling_shift": args.sampling_shift,
    }  # fmt: skip


def steps_and_file(text):
    steps, _, path = text.partition("=")
    if not (steps.isdecimal() and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not STEPS=FILE, such as 8=lora.safetensors")
    return [steps, path]


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the table, LoRAs and routers")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of the miniature's weights")
    parser.add_argument("--router", help="router file of stage 1; without one the heuristic router")
    parser.add_argument("--heuristic", action="store_true", help="the heuristic router, whatever --router says")
    parser.add_argument("--sparsities", type=lambda text: [float(s) for s in text.split(",")], default=[0.97, 0.99])
    parser.add_argument(
        "--trained", nargs="+", choices=FORMATS, default=["int8"], help="formats of the forward pass, a run each"
    )
    parser.add_argument(
        "--evaluated", nargs="+", choices=FORMATS, help="formats that every run is judged in; default: --trained"
    )
    parser.add_argument(
        "--outliers", nargs="+", type=Outliers.parse, default=[Outliers()], metavar="SIDE:CHANNELS:GAIN"
    )
    parser.add_argument(
        "--minutes", type=float, help="a call of this script ends after so many; default: when all is done"
    )
    parser.add_argument("--steps", type=int, default=400, help="of each run")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--loss", choices=LOSSES, default="distill")
    parser.add_argument("--lora-rank", type=int, default=32)
    parser.add_argument("--start", help="folder of an earlier run whose LoRA and ratios this one begins with")
    parser.add_argument(
        "--guided",
        type=float,
        default=1.0,
        metavar="SCALE",
        help="train the velocity that guidance makes, too; 1: none",
    )
    parser.add_argument(
        "--few-lora", nargs="+", default=[], metavar="STEPS=FILE", type=steps_and_file,
        help="train with distilled LoRAs merged, too, one for each number of steps",
    )  # fmt: skip
    parser.add_argument(
        "--few-states",
        choices=STATES,
        default="sampled",
        help="of --few-lora: the model's own way, or clips with noise",
    )
    parser.add_argument("--sampling-steps", type=int, default=20, help="of --guided")
    parser.add_argument("--sampling-shift", type=float, default=SHIFT, help="of the levels of --guided and --few-lora")
    parser.add_argument("--knots", type=int, default=1, help="ratios along the query axis, where the router has one")
    parser.add_argument("--optimiser", choices=OPTIMISERS, default="adamw", help="of the LoRA")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--ratio-learning-rate", type=float, default=2e-2)
    parser.add_argument("--shift", type=float, default=5.0, help="of the noise levels that are trained on")
    parser.add_argument("--drop-caption", type=float, default=0.1, help="share of clips trained without their caption")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--clips", type=int, default=96, help="training clips, encoded at the start")
    parser.add_argument("--validation-clips", type=int, default=8, help="of held-out captions")
    parser.add_argument("--levels", type=int, default=6, help="noise levels that each of them is judged at")
    parser.add_argument(
        "--arch",
        type=int,
        choices=ASSEMBLED,
        help="in this card's instructions, as benchmarks.consumer: 89 has P V in INT8",
    )
    for name, value in (("frames", 81), ("height", 480), ("width", 832)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(argv)
    if args.tiny:
        args.steps, args.batch, args.micro_batch, args.clips = min(args.steps, 4), 2, 2, 2
        args.validation_clips, args.levels, args.sparsities = 1, 2, args.sparsities[:1]
    args.evaluated = args.evaluated or args.trained
    if args.arch and torch.device(args.device).type != "cuda":
        parser.error(f"--arch {args.arch} compiles for an H100 or H200 at hand, and the device is {args.device}")
    if len(dict(args.few_lora)) < len(args.few_lora):
        parser.error("--few-lora names two files for the same number of steps")
    try:
        Stage2Config(**of_sampling(args))
        for _, path in args.few_lora:
            check_lora_file(path)
    except ValueError as error:
        parser.error(str(error))
    args.compile = args.compile and not args.arch  # which would compile the blocks' kernels for that card too
    return args


def main(argv=None):
    args = parse(argv)
    use_device(args.device)  # accelerate takes the current one
    args.out.mkdir(parents=True, exist_ok=True)
    if args.arch:
        imitate(args.arch)
    # by outliers first: what is judged against one dense model follows each other
    jobs = [
        Job(sparsity, form, gains) for gains in args.outliers for sparsity in args.sparsities for form in args.trained
    ]
    with attention_backend("cudnn", torch.device(args.device)):
        study = Study(args)
        for number, job in enumerate(jobs):
            try:
                study.run(job)
            except TimeIsUp:
                study.say(
                    f"the minutes are over, {len(jobs) - number} of {len(jobs)} runs are left: run the same command again"
                )
                break
            gc.collect()  # a trainer and its optimiser
    print(f"\n{args.steps} steps of {args.batch} clips, {args.loss} loss\n{table(study.content['rows'])}")


if __name__ == "__main__":
    sys.exit(main())
