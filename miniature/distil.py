"""Distil the miniature into a LoRA that needs a few steps and no guidance.

    python -m miniature.distil --out few --minutes 3 --student-steps 4 --attention cudnn --mix small=1 small=1,full=2
    python -m miniature.distil --out few --minutes 2 --student-steps 8 --attention cudnn --mix small=1,full=2 --resume
    python -m miniature.distil --out tiny --tiny --steps 4 --minutes 0        a trial on a CPU, in seconds

The student takes --student-steps Euler steps at guidance 1 along the noise schedule of miniature.sample. For each of them it learns
the mean velocity of the teacher, the same weights in --teacher-steps steps at --guidance, between the same two noise levels and
from the same noisy video. That video is one of the teacher's own way, or (a share --own of the times) where the student's
steps have led, so that errors of earlier steps do not add up. Only captions and noise are needed: no clips, no VAE.

Work goes in rounds: a batch of noises of one size is taken down the whole schedule, which gives a segment (noisy video, level,
velocity) per step, and then the student is trained on --reuse times as many segments, drawn from the last --keep rounds of that size. --mix gives
the sizes' shares of the time (sizes as in train_long); several mixes share the run's time equally, one after the other.

Writes wan_miniature_4_steps_lora.safetensors (averaged, 16 bit, for ComfyUI's Load LoRA; named by --student-steps),
live_lora.safetensors (where --resume continues, with other noises, for as many steps or for others) and distil_log_1.json, _2 after
a --resume. 4 and 8 steps have noise levels in common, at which their mean velocities differ, and the model is told the level
alone: train a LoRA for each. The log has the relative error of the student's final latents against the teacher's from
the same noise, beside that of the teacher's weights in as few steps, with guidance and without.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from .captions import embed, split_captions
from .lora import add_lora, load_lora, lora_of, merge_lora, save_lora, set_lora
from .optim import Average, Budget, Log, Optimiser, options_of
from .sample import GUIDANCE, SHIFT, WEIGHTS, noise_schedule
from .train_dit import DIT_FILE
from .train_long import ATTENTION, REAL, TINY, Size, attention_backend, build, check_mixes, parse_mix, prepare
from .wan import WanModel
from .weight_files import weight_file

LIVE_FILE, LOG_FILE = "live_lora.safetensors", "distil_log_{}.json"
WARMUP = 30  # steps
# of a video whose self-attention costs as much as the rest (H200: 0.5 us a token at 2,184, 2.7 at 32,760)
ATTENTION_TOKENS = 8000

Velocity = Callable[[torch.Tensor, float], torch.Tensor]  # (x, noise level) -> velocity, both (B, 16, T, h, w) float32


def lora_file(counts: tuple[int, ...]) -> str:
    """Name of the LoRA for these numbers of steps."""
    return f"wan_miniature_{'_'.join(map(str, counts))}_steps_lora.safetensors"


def latent_shape(size: Size, batch: int) -> tuple[int, ...]:
    """(batch, 16, T, h, w) of videos of this size."""
    return batch, 16, (size.frames + 3) // 4, size.height // 8, size.width // 8


def work(size: Size) -> float:
    """Cost of a model call on a batch of this size, in tokens of a short video."""
    batch, _, *grid = latent_shape(size, size.batch)
    tokens = math.prod(grid) // 4
    return batch * tokens * (1 + tokens / ATTENTION_TOKENS)


def velocity_of(model: WanModel, context: torch.Tensor, guidance: float = 1.0) -> Velocity:
    """A model's velocity for a batch of captions; with guidance, both halves in one call of twice the batch."""

    def velocity(x: torch.Tensor, level: float | torch.Tensor) -> torch.Tensor:
        t = torch.as_tensor(level, dtype=torch.float32, device=x.device).expand(len(x)) * 1000
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type != "cpu"):
            if guidance == 1:
                return model(x, t, context).float()
            both = torch.cat([context, torch.zeros_like(context)])
            guided, base = model(x.repeat(2, 1, 1, 1, 1), t.repeat(2), both).float().chunk(2)
        return base + guidance * (guided - base)

    return velocity


def euler(velocity: Velocity, x: torch.Tensor, levels: list[float]) -> torch.Tensor:
    """x at the last of the noise levels, by one step from each to the next."""
    for level, following in itertools.pairwise(levels):
        x = x + (following - level) * velocity(x, level)
    return x


def segment_levels(count: int, teacher_steps: int, shift: float) -> list[list[float]]:
    """The teacher's noise levels within each of the student's `count` steps, both ends included; at least `teacher_steps` steps in all."""
    each = math.ceil(teacher_steps / count)
    levels = noise_schedule(count * each, shift).tolist()
    return [levels[i : i + each + 1] for i in range(0, count * each, each)]


@torch.no_grad()
def segments(teacher: Velocity, student: Velocity | None, noise: torch.Tensor, levels: list[list[float]]):
    """[(x, level, velocity)] for each of the student's steps: what the teacher would go from x, on average, until its end.

    Args:
        student: whose steps lead to the next x; None: the teacher's.
        levels: of segment_levels().
    """
    made, x = [], noise
    for part in levels:
        span = part[-1] - part[0]
        end = euler(teacher, x, part)
        made.append((x, part[0], (end - x) / span))
        x = end if student is None else x + span * student(x, part[0])
    return made


class Replay:
    """The segments of one size's last rounds: x and velocity (both bfloat16), level, caption's number, as stacked tensors."""

    def __init__(self, rounds: int):
        self.rounds, self.columns = rounds, None

    def add(self, made, caption: torch.Tensor) -> None:
        """made: of segments(). caption: (B,) numbers."""
        x, level, velocity = zip(*made, strict=True)
        level = torch.tensor(level, device=caption.device).repeat_interleave(len(caption))
        new = torch.cat(x).bfloat16(), level, torch.cat(velocity).bfloat16(), caption.repeat(len(made))
        old = self.columns or [column[:0] for column in new]
        self.columns = [torch.cat(pair)[-self.rounds * len(level) :] for pair in zip(old, new, strict=True)]

    def draw(self, batch: int, generator: torch.Generator) -> list[torch.Tensor]:
        """[x, level, velocity, caption] of `batch` different segments."""
        rows = torch.randperm(len(self.columns[1]), generator=generator)[:batch].to(self.columns[1].device)
        return [column[rows] for column in self.columns]


class Test:
    """Noises of held-out captions and what the guided teacher makes of them, by size."""

    def __init__(self, teacher: WanModel, sizes: dict[str, Size], names: list[str], args, device):
        held_out = split_captions()[1]
        self.args, self.parts = args, {}
        for name in names:
            clips = min(args.test_clips, sizes[name].batch)
            generator = torch.Generator().manual_seed(12)
            noise = torch.randn(latent_shape(sizes[name], clips), generator=generator).to(device)
            context = [embed(str(held_out[i * len(held_out) // clips])) for i in range(clips)]
            context = torch.cat(context).to(device)
            self.parts[name] = (
                noise,
                context,
                self.end(teacher, noise, context, args.teacher_steps, args.guidance),
            )

    @torch.no_grad()
    def end(self, model, noise, context, steps: int, guidance: float) -> torch.Tensor:
        """Final latents."""
        levels = noise_schedule(steps, self.args.shift).tolist()
        return euler(velocity_of(model, context, guidance), noise, levels)

    def errors(self, model: WanModel, guidance: float = 1.0) -> dict[str, float]:
        """{"SIZE_COUNT": relative error of the final latents in COUNT steps}."""
        found = {}
        for name, (noise, context, expected) in self.parts.items():
            for count in self.args.student_steps:
                out = self.end(model, noise, context, count, guidance)
                found[f"{name}_{count}"] = float((out - expected).norm() / expected.norm())
        return found


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """The transformer's state dict in float32, from a folder of weights or from its file.

    Raises:
        FileNotFoundError: neither is there.
    """
    file = path if path.is_file() else weight_file(DIT_FILE, path)
    if not file.exists():
        raise FileNotFoundError(f"no transformer at {file}: give --from a folder of weights, or the file")
    return {key: value.float() for key, value in load_file(file).items()}


def train(student, teacher, judge, state, args, *, sizes, mixes, budget: Budget, seed: int, log: Log, save, device):
    """Rounds of segments and steps on them until the budget is used up; returns the averaged LoRA.

    judge: a model like the teacher; it gets the student's merged weights to go its way, without gradients.
    """
    captions = split_captions()[0]
    contexts = torch.cat([embed(str(caption)) for caption in captions]).to(device)
    generator = torch.Generator().manual_seed(seed)
    optimiser = Optimiser(student, lambda name, p: False, adam_lr=args.lr, hold=0.5, warmup=WARMUP)
    average = Average(student, 0.98)
    replay = {name: Replay(args.keep) for mix in mixes for name in mix}
    spent, now_mix = {}, None
    step, rounds, seen, printed, saved = 0, 0, {}, time.monotonic(), time.monotonic()
    while (progress := budget.progress(step)) < 1:
        mix = mixes[min(int(progress * len(mixes)), len(mixes) - 1)]
        if mix is not now_mix:
            spent, now_mix = dict.fromkeys(mix, 0.0), mix
        name = min(mix, key=lambda name: (spent[name] + work(sizes[name])) / mix[name])
        spent[name] += work(sizes[name])
        size, count = sizes[name], args.student_steps[rounds % len(args.student_steps)]
        rounds += 1

        caption = torch.randint(len(captions), (size.batch,), generator=generator).to(device)
        noise = torch.randn(latent_shape(size, size.batch), device=device)
        own = float(torch.rand((), generator=generator)) < args.own
        if own:
            judge.load_state_dict(merge_lora(state, lora_of(student.state_dict())))
        made = segments(
            velocity_of(teacher, contexts[caption], args.guidance),
            velocity_of(judge, contexts[caption]) if own else None,
            noise,
            segment_levels(count, args.teacher_steps, args.shift),
        )
        replay[name].add(made, caption)

        for _ in range(count * args.reuse):
            x, level, target, caption = replay[name].draw(size.batch, generator)
            # An input that needs a gradient spares the first block a compilation of its own.
            x = x.float().requires_grad_()
            velocity = velocity_of(student, contexts[caption])(x, level)
            loss = (velocity - target.float()).square().mean()
            loss.backward()
            factor = optimiser.step(budget.progress(step))
            average.update()
            step += 1
            seen.setdefault(name, []).append(loss.detach())
            if budget.progress(step) >= 1:
                break
        now = time.monotonic()
        if now - printed > args.print_seconds or budget.progress(step) >= 1:
            means = {f"loss_{key}": torch.stack(losses).mean().item() for key, losses in seen.items()}
            counts = {f"steps_{key}": len(losses) for key, losses in seen.items()}
            log.record(stage="train", seconds=budget.elapsed(), step=step, rounds=rounds, lr=factor, **means, **counts)
            if not all(map(math.isfinite, means.values())):
                raise FloatingPointError(f"training diverged at step {step}: lower --lr")
            printed, seen = now, {}
        if now - saved > args.save_seconds and budget.progress(step) < 1:
            save(average, step)
            saved = time.monotonic()
    log.result(steps=step, rounds=rounds)
    return average


def distil(args) -> None:
    """One run, from preparation to saved files."""
    start = time.monotonic()
    device, sizes = torch.device(args.device), TINY if args.tiny else REAL
    prepare(args, device)
    live = args.out / LIVE_FILE
    number = 1 + (len(list(args.out.glob(LOG_FILE.format("*")))) if args.resume else 0)
    seed = args.seed + 1000 * number
    torch.manual_seed(seed)
    header = options_of(args)
    header |= {"number": number, "torch": torch.__version__}
    header["device_name"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    log = Log(args.out / LOG_FILE.format(number), header)
    print(header, flush=True)

    state = {key: value.to(device) for key, value in load_weights(args.start).items()}
    # In training mode the blocks are compiled; nothing else depends on it.
    teacher, judge, student = (build(state, args.compile, device).train().requires_grad_(False) for _ in range(3))
    add_lora(student, args.rank, args.seed)
    if args.resume:
        set_lora(student, load_lora(live))
    mixes = [parse_mix(text) for text in args.mix]
    names = list(dict.fromkeys(name for mix in mixes for name in mix))
    about = f"LoRA for {', '.join(map(str, args.student_steps))} steps at guidance 1 and shift {args.shift:g}, distilled from guidance {args.guidance:g}"

    with attention_backend(args.attention, device):
        test = Test(teacher, sizes, names, args, device)
        log.result(error_teacher_guided=test.errors(teacher, args.guidance), error_teacher=test.errors(teacher))

        def save(average: Average, step: int) -> None:
            save_lora(args.out / lora_file(args.student_steps), lora_of(average.state_dict()), torch.bfloat16, about)
            save_lora(live, lora_of(student.state_dict()), torch.float32, "live LoRA of miniature.distil")
            lora = load_lora(args.out / lora_file(args.student_steps))
            judge.load_state_dict(merge_lora(state, lora))
            log.record(stage="test", seconds=time.monotonic() - start, step=step, **test.errors(judge))
            log.write()

        budget = Budget(args.minutes * 60, args.steps, start)
        budget.restart()
        average = train(student, teacher, judge, state, args, sizes=sizes, mixes=mixes, budget=budget,
                        seed=seed, log=log, save=save, device=device)  # fmt: skip
        save(average, log.data["results"]["steps"])
    if device.type == "cuda":
        log.result(peak_memory_gib=torch.cuda.max_memory_allocated(device) / 2**30)
    log.result(seconds=time.monotonic() - start)
    log.write()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the LoRA and its log")
    parser.add_argument("--from", dest="start", type=Path, default=WEIGHTS, help="folder of the weights, or their file")
    parser.add_argument("--resume", action="store_true", help="go on from the live LoRA in --out")
    parser.add_argument("--minutes", type=float, required=True, help="of this run, from its start to the last step")
    parser.add_argument("--steps", type=int, help="train this many steps instead of by the clock")
    parser.add_argument(
        "--student-steps", default="4", help="numbers of sampling steps that one LoRA serves, e.g. 4 or 4,8"
    )
    parser.add_argument("--teacher-steps", type=int, default=20, help="of the whole schedule, rounded up")
    parser.add_argument("--guidance", type=float, default=GUIDANCE, help="of the teacher")
    parser.add_argument("--shift", type=float, default=SHIFT, help="of the noise levels, ComfyUI's ModelSamplingSD3")
    parser.add_argument("--mix", nargs="+", default=["small=1", "small=1,full=1"], help="shares of the time by size")
    parser.add_argument("--own", type=float, default=0.5, help="share of the rounds that go the student's own way")
    parser.add_argument("--reuse", type=int, default=3, help="how often a segment is trained on, on average")
    parser.add_argument("--keep", type=int, default=4, help="rounds of a size that segments are drawn from")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--attention", choices=("any", *ATTENTION), default="any", help="torch's attention backend")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument(
        "--test-clips", type=int, default=16, help="most held-out captions per size; a size's batch at most"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="sizes for a trial of the code on a CPU, not for quality")
    parser.add_argument("--print-seconds", type=float, default=5.0)
    parser.add_argument(
        "--save-seconds", type=float, default=30.0, help="files are also written, and tested, this often"
    )
    args = parser.parse_args(argv)
    try:
        args.student_steps = tuple(sorted({int(count) for count in args.student_steps.split(",")}))
    except ValueError as error:
        parser.error(str(error))
    check_mixes(parser, args.mix)
    if args.student_steps[0] < 1:
        parser.error("--student-steps: numbers from 1 on, with commas between them, as in 4,8")
    if args.resume and not (args.out / LIVE_FILE).exists():
        parser.error(f"--resume: no {LIVE_FILE} in {args.out}: name the --out folder of an earlier run")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    distil(args)


if __name__ == "__main__":
    main()
