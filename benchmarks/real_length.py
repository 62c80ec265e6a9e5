"""What each method costs in quality at real length: the miniature at 81 frames of 832 x 480, 32,760 tokens.

    python -m benchmarks.real_length --weights FOLDER --router FILE --lora 0.97=FILE 0.99=FILE --few-lora 4=FILE 8=FILE --peers FOLDER --minutes 6
    python -m benchmarks.real_length --table --out FILE --docs docs/QUALITY.md      the table of FILE, nothing is measured
    python -m benchmarks.real_length --tiny --device cpu         a random miniature of a few tokens: tries the script

Rows are measured in the order of their value and written at once; what the file has already is not measured again, so a run
that --minutes ended is continued by the same command. Rows that cannot run are left out and named under the table.

Attention error: ||out - dense|| / ||dense|| of the same q, k and v, dense in float32, root mean square over calls of the model
run dense, all layers, steps spread over the run. Stage 2 is measured on calls of the model with its LoRA, run dense. A fitted
ratio is fitted in each of these calls; in a video as the node does it, in every fourth step of a run of more than 8.
Validation loss: flow matching, held-out captions, levels and noise equal for all rows. PSNR, and SSIM of every fourth frame:
against the dense video of the same noise and number of steps. Frames right: by the image test of miniature/objects.py,
every check; a video is right with 95% of its frames. The main rows have --prompts videos, the others --few-prompts or none.
"""

import argparse
import functools
import hashlib
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from miniature.captions import split_captions
from miniature.captures import Recorder, by_layer
from miniature.objects import examine
from miniature.sample import GUIDANCE, SHIFT, WEIGHTS, with_loras
from miniature.train_long import attention_backend
from miniature.vae import denormalise_latents, psnr
from miniature.weight_files import KINDS, weight_file
from sla2_kernels import load_router
from sla2_kernels.whole_file import write_whole

from . import lists, results
from . import quality_variants as names
from .measure import environment, use_device
from .miniature_model import SEED, Miniature
from .quality_report import real_length_markdown
from .readme import insert
from .rivals import sol_attn
from .rivals.packages import add_peer_folders
from .target_error import dense as exact_attention
from .video_metrics import ssim

TRANSFORMER = "wan_miniature_dit.safetensors"
EVERY_FRAME = 4  # of SSIM
SHIFTED = 3  # calls by which the recorded ones differ from a caption to the next
TAU = 1.3
BLOCKS = {names.OTHER_CARDS: 128, names.FINE: 64}  # queries per selection
SOME = 5  # of the recorded calls, one in so many decides sol_attn's count: all layers are met


@dataclass(frozen=True)
class Job:
    """One row. sparsity, precision: None where the method has none. videos: how many are sampled. loss: validation loss too."""

    variant: str
    sparsity: float | None
    precision: str | None
    steps: int
    videos: int
    loss: bool = True

    @property
    def key(self):
        return self.variant, self.sparsity, self.precision, self.steps

    def __str__(self):
        skips = "" if self.sparsity is None else f"skips {100 * self.sparsity:g}% "
        return f"{self.steps} steps, {skips}{self.variant} {self.precision or ''}".strip()


class Absent(Exception):
    """A row that cannot be measured here, and why."""


def plan(sparsities, steps, few_steps, videos, few_videos):
    """Jobs in the order of their value. sparsities: the main one first, then in the order of their value."""
    main, *others = sparsities

    def of(sparsity, count, low_bit, rest, **more):
        found = [Job(name, sparsity, "int8", more.get("steps", steps), count) for name in low_bit]
        return found + [Job(name, sparsity, bits, more.get("steps", steps), count) for name, bits in rest]

    trained, sol = (names.FITTED, names.STAGE_1, names.STAGE_2), ((names.SOL_EQUAL, None),)
    rivals = (*sol, (names.V1_FITTED, "16bit"), (names.BLOCK_SPARSE, "16bit"))
    jobs = [Job(names.DENSE, None, None, steps, videos)]
    jobs += of(main, videos, trained, sol)
    jobs.append(Job(names.SOL_TAU, None, None, steps, videos))
    jobs += of(main, videos, (names.ROUTER_FITTED, names.UNTRAINED), rivals[1:])
    fine = names.STAGE_1 + names.FINE, names.STAGE_2 + names.FINE
    jobs += of(main, few_videos, (*fine, names.ROUTER_FITTED + names.FINE), ())
    for sparsity in others[:2]:
        jobs += of(sparsity, videos, trained, ())
    for count in few_steps:
        jobs.append(Job(names.DENSE, None, None, count, videos, loss=False))
        rows = [*of(main, videos, trained, sol, steps=count), Job(names.SOL_TAU, None, None, count, videos)]
        rows += of(main, videos, (names.ROUTER_FITTED,), (), steps=count)
        rows += of(others[1], videos, (names.FITTED,), (), steps=count) if len(others) > 1 else []
        # a distilled model is not trained for the flow matching loss
        jobs += [replace(job, loss=False) for job in rows]
    for sparsity in others:
        jobs += of(sparsity, few_videos, (*trained, names.UNTRAINED), rivals)
    for sparsity in sparsities:
        jobs += [Job(name, sparsity, "16bit", steps, 0) for name in (*trained, names.UNTRAINED)]
    jobs += [Job(names.BLOCK_SPARSE, sparsity, "int8", steps, 0) for sparsity in sparsities]
    elsewhere = (names.FITTED + names.OTHER_CARDS, names.UNTRAINED + names.OTHER_CARDS)
    jobs += [Job(name, sparsity, "int8", steps, 0) for sparsity in sparsities for name in elsewhere]
    jobs += [Job(name, sparsity, "int8", steps, 0) for sparsity in others for name in fine]
    return list({job.key: job for job in reversed(jobs)}.values())[::-1]


@dataclass(frozen=True)
class Call:
    """A recorded call of a dense run, (B, N, H, D): its step, caption, and dense attention in float32."""

    layer: int
    step: int
    caption: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    exact: torch.Tensor

    @classmethod
    def of(cls, capture, step, caption):
        q, k, v = (x.transpose(1, 2) for x in (capture.q, capture.k, capture.v))
        return cls(capture.layer, step, caption, q, k, v, exact_attention(q, k, v, torch.float32))


def kept_calls(calls, per_video, caption, guided):
    """Numbers of the model calls of one caption's dense run that are recorded; both halves of guidance are met."""
    every = max(1, calls // per_video)
    if guided:
        every |= 1
    return [number for number in range(calls) if (number + SHIFTED * caption) % every == 0], every


class Run:
    """The model in so many steps with these LoRAs merged, and what was made of it: dense videos and recorded calls."""

    def __init__(self, miniature, captions, recorded, per_video, seed=3 * SEED, kept=None):
        """kept: None, or called with a number: the path of a file that has that dense video, or gets it."""
        self.miniature, self.captions, self.recorded = miniature, captions, recorded
        self.per_video, self.seed, self.kept = per_video, seed, kept
        self.videos, self.calls = {}, []
        self.done = set()

    @property
    def halves(self):
        return 1 if self.miniature.cfg == 1 else 2

    def sample(self, number, attention):
        return self.miniature._sample(str(self.captions[number]), self.seed + number, attention)

    @torch.no_grad()
    def decode(self, latents):
        with self.miniature._autocast():
            return self.miniature.vae.decode(denormalise_latents(latents))[0].float()

    def dense(self, numbers, decode=True):
        """Samples these captions densely, where that was not done yet; records calls of the first ``recorded``."""
        for number in numbers:
            if number in (self.videos if decode else self.done):
                continue
            if decode and (video := self._kept_video(number)) is not None:
                self.videos[number] = video
                continue
            latents = self._record(number) if number < self.recorded else self.sample(number, names.dense)
            self.done.add(number)
            if decode:
                self.videos[number] = video = self.decode(latents).half().contiguous()
                if self.kept:
                    write_whole(self.kept(number), functools.partial(save_file, {"video": video}))

    def _kept_video(self, number):
        """None where no file has it; a damaged file is told and will be written again."""
        path = self.kept and self.kept(number)
        if not path or not path.exists():
            return None
        try:
            video = load_file(path, device=str(self.miniature.device))["video"]
            if video.shape != (3, *self.miniature.size):
                raise ValueError(f"its shape is {tuple(video.shape)}")
        except (SafetensorError, KeyError, ValueError) as error:
            print(f"{path} is no dense video ({error}): it is sampled again", flush=True)
            return None
        return video

    def _record(self, number):
        model = self.miniature.model
        kept, every = kept_calls(self.miniature.steps * self.halves, self.per_video, number, self.halves == 2)
        _, _, frames, height, width = self.miniature.latent_shape
        dtype = torch.bfloat16 if self.miniature.bf16 else None
        recorder = Recorder((frames, height // 2, width // 2), every=every, dtype=dtype)
        recorder.calls = dict.fromkeys(range(model.config.num_layers), SHIFTED * number)
        latents = self.sample(number, recorder)
        if number not in self.done:
            steps = [call // self.halves for call in kept for _ in range(model.config.num_layers)]
            self.calls += [Call.of(c, step, number) for c, step in zip(recorder.captures, steps, strict=True)]
        return latents

    def captures(self):
        """Captures of training captions, for what is fitted to them."""
        return self.miniature.record("train", prompts=2, per_video=self.per_video)


@torch.no_grad()
def output_errors(variant, calls):
    """{"error", "error_by_caption", "error_by_layer", "error_by_step", "kept"}: root mean square over the calls."""
    variant.begin(None, 1)
    squares, kept = [], []
    for call in calls:
        out = variant(call.layer, call.q, call.k, call.v).float()
        squares.append((out - call.exact).square().sum() / call.exact.square().sum())
        if call.layer == 0:
            kept.append(variant.kept(call.q, call.k))
    squares = torch.stack(squares).tolist()

    def by(name):
        groups = {}
        for call, square in zip(calls, squares, strict=True):
            groups.setdefault(getattr(call, name), []).append(square)
        return {str(group): math.sqrt(sum(some) / len(some)) for group, some in sorted(groups.items())}

    found = {f"error_by_{name}": by(name) for name in ("caption", "layer", "step")}
    mean = None if None in kept else sum(kept) / len(kept)
    return {"error": math.sqrt(sum(squares) / len(squares)), **found, "kept": mean, "calls": len(calls)}


def router_beside(lora):
    """The router file that was trained along with a LoRA: of the same name with "router" for "lora", in its folder or in sla2/.

    Raises FileNotFoundError.
    """
    name = lora.name.replace("lora", "router")
    for path in (lora.with_name(name), lora.parent.parent / "sla2" / name):
        if path != lora and path.exists():
            return path
    raise FileNotFoundError(
        f"no {name} beside {lora}: stage 2 needs the router whose ratios were trained with that LoRA"
    )


class Bench:
    """Measures jobs. Models, dense videos, recorded calls and fits are made when the first row needs them."""

    def __init__(self, args):
        self.args, self.device = args, torch.device(args.device)
        self.router = load_router(args.router) if args.router else None
        held_out = split_captions()[1]
        self.captions = [held_out[i * len(held_out) // args.prompts] for i in range(args.prompts)]
        self.stage2_routers = {sparsity: load_router(router_beside(path)) for sparsity, path in args.lora.items()}
        self.start = (
            Miniature.tiny(self.device) if args.tiny else Miniature.load(args.weights, self.device, levels=args.levels)
        )
        size = self.start.size if args.tiny else (args.frames, args.height, args.width)
        self.start = replace(self.start, size=size, shift=args.shift)
        self.absent = {}

    @functools.cache  # noqa: B019  one Bench a process
    def run(self, steps, loras=()):
        """Run in so many steps: guided with args.cfg, or with the distilled LoRA of that number of steps and without guidance."""
        few = self.args.few_lora.get(steps)
        cfg = self.args.cfg if few is None and steps == self.args.sampling_steps else 1.0
        paths = (*((few,) if few else ()), *loras)
        model = with_loras(self.start.model, paths) if paths else self.start.model
        miniature = replace(self.start, model=model, steps=steps, cfg=cfg)
        kept = self._kept(miniature) if self.args.dense_videos and not loras else None
        return Run(miniature, self.captions, self.args.recorded, self.args.calls_per_video, kept=kept)

    def _kept(self, miniature):
        """A function of a dense video's number that returns its path: the name tells weights, sampling, size, caption, noise and card."""
        weights = (*KINDS, f"--few-lora {miniature.steps}")
        files = {name: digest for name, digest in files_of(self.args).items() if name in weights}
        sampling = miniature.steps, miniature.cfg, miniature.shift, miniature.size
        card = environment(self.args.device)

        def path(number):
            facts = repr((files, sampling, str(self.captions[number]), number, card["card"], card["torch"]))
            digest = hashlib.sha256(facts.encode()).hexdigest()[:16]
            return self.args.dense_videos / f"{miniature.steps}_steps_{digest}.safetensors"

        return path

    @functools.cache  # noqa: B019
    def train_captures(self):
        return self.run(self.args.sampling_steps).captures()

    @functools.cache  # noqa: B019
    def projections(self, sparsity):
        return names.fit_v1(by_layer(self.train_captures()), [sparsity])

    def own_run(self, job):
        """The Run whose model the row's method runs in."""
        return self.run(job.steps, (self.lora(job.sparsity),) if job.variant.startswith(names.STAGE_2) else ())

    def lora(self, sparsity):
        if sparsity not in self.args.lora:
            raise Absent(f"no --lora for {100 * sparsity:g}%")
        return self.args.lora[sparsity]

    def variant(self, job, calls):
        sparsity, bits = job.sparsity, job.precision
        if job.variant == names.DENSE:
            return names.Variant(names.DENSE, names.dense)
        block = next((size for ending, size in BLOCKS.items() if job.variant.endswith(ending)), None)
        if job.variant.startswith(names.FITTED):
            return names.fitted(sparsity, bits, job.variant, block)
        if job.variant.startswith(names.UNTRAINED):
            return names.sla2(job.variant, sparsity, bits, None, False, query_block=block)
        if job.variant.startswith((names.STAGE_1, names.ROUTER_FITTED)) and self.router is None:
            raise Absent("no --router")
        if job.variant.startswith(names.ROUTER_FITTED):
            router = replace(self.router, q_block=block or self.router.q_block)
            return names.fitted(sparsity, bits, job.variant, router=router)
        if job.variant.startswith((names.STAGE_1, names.STAGE_2)):
            router = self.router if job.variant.startswith(names.STAGE_1) else self.stage2_routers[sparsity]
            return names.sla2(job.variant, sparsity, bits, router, True, query_block=block)
        if job.variant == names.V1_FITTED:
            fits = self.projections(sparsity)
            return names.v1(job.variant, sparsity, lambda layer, q: fits[layer, sparsity])
        if job.variant == names.BLOCK_SPARSE:
            return names.block_sparse(sparsity, bits)
        try:
            sol_attn.load_compiled()
        except (ImportError, OSError, AttributeError, RuntimeError) as error:
            raise Absent(f"{type(error).__name__}: {error}".splitlines()[0]) from error
        if job.variant == names.SOL_TAU:
            return names.compiled_sol(job.variant, None, tau=TAU)
        some = [(call.q, call.k) for call in calls[::SOME]]
        return names.compiled_sol(job.variant, sparsity, topk_ratio=names.equal_topk_ratio(sparsity, some))

    def measure(self, job):
        """The row of a job. Raises Absent, or what a method raises that cannot run."""
        begin = time.monotonic()
        if job.steps != self.args.sampling_steps and job.steps not in self.args.few_lora:
            raise Absent(f"no --few-lora for {job.steps} steps")
        own, reference = self.own_run(job), self.run(job.steps)
        some = range(0, len(self.captions), max(1, len(self.captions) // job.videos)) if job.videos else ()
        reference.dense(some)
        own.dense(range(self.args.recorded), decode=False)
        variant = self.variant(job, own.calls)
        row = {"variant": job.variant, "sparsity": job.sparsity, "precision": job.precision, "steps": job.steps}
        row |= output_errors(variant, own.calls)
        if job.loss:
            variant.begin(None, 1)
            row["validation_losses"] = own.miniature.validation_losses(variant, self.args.loss_clips)
        row["videos"] = [self._video(job, variant, own, reference.videos[number], number) for number in some]
        return row | {"seconds": time.monotonic() - begin}

    def _video(self, job, variant, own, wanted, number):
        wanted, found = wanted.float(), {"caption": str(self.captions[number])}
        if job.variant == names.DENSE:
            video = wanted
        else:
            variant.begin(job.steps, own.halves)
            video = own.decode(own.sample(number, variant))
            found["psnr"] = psnr(video, wanted)
            found["ssim"] = ssim(video[:, ::EVERY_FRAME], wanted[:, ::EVERY_FRAME])
        verdict = examine(video, self.captions[number])
        return found | {"frames_right": verdict.share, "passed": verdict.passed, "checks": verdict.shares()}


def files_of(args):
    """{what: SHA-256 of the file} of everything that decides the rows."""
    files = {} if args.tiny else {name: weight_file(name, args.weights) for name in list(KINDS)[:2]}
    files |= {"router": Path(args.router)} if args.router else {}
    for name, paths in (("lora", args.lora), ("few-lora", args.few_lora)):
        files |= {f"--{name} {number:g}": path for number, path in paths.items()}
    return {name: hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16] for name, path in files.items()}


def settings_of(args):
    keys = ("cfg", "shift", "frames", "height", "width", "levels", "loss_clips", "recorded", "calls_per_video")
    return {key: getattr(args, key) for key in keys}


def started(args):
    """The content of --out to go on with. Raises ValueError where its rows were measured with other files or settings."""
    content, files, settings = results.load(args.out), files_of(args), settings_of(args)
    for kind, now in (("files", files), ("settings", settings)):
        for name, value in content.get(kind, {}).items():
            if name in now and now[name] != value:
                raise ValueError(
                    f"{args.out} has rows of another {name} ({value}, now {now[name]}): give another --out, or delete that file."
                )
    return content | {
        "files": content.get("files", {}) | files,
        "settings": settings,
        "environment": environment(args.device),
    }


def measure_all(args, jobs):
    """Measures what --out does not have yet, until --minutes are over; returns the content."""
    begin, content = time.monotonic(), started(args)
    have = {(row["variant"], row["sparsity"], row["precision"], row["steps"]) for row in content["rows"]}
    left = [job for job in jobs if job.key not in have]
    content["absent"], bench = {}, None
    for number, job in enumerate(left):
        if args.minutes and time.monotonic() - begin > 60 * args.minutes:
            content["left"] = len(left) - number
            print(f"{args.minutes:g} minutes are over, {len(left) - number} rows are left: run the same command again")
            break
        bench = bench or Bench(args)
        try:
            row = bench.measure(job)
        except (Absent, RuntimeError, ValueError) as error:
            # such as a kernel that refuses a size: said under the table, and tried again in the next run
            reason = str(error) if isinstance(error, Absent) else f"{type(error).__name__}: {error}".splitlines()[0]
            content["absent"][str(job)] = reason
            print(f"{time.monotonic() - begin:4.0f} s  left out: {job}: {reason}", flush=True)
            continue
        content["rows"].append(row)
        results.save(args.out, content)
        print(f"{time.monotonic() - begin:4.0f} s  {job}: {line(row)}", flush=True)
    else:
        content["left"] = 0
    results.save(args.out, content)
    return content


def line(row):
    losses, videos = row.get("validation_losses"), row["videos"]
    more = f" loss {sum(losses) / len(losses):.4f}" if losses else ""
    for key in ("psnr", "ssim", "frames_right"):
        values = [video[key] for video in videos if key in video]
        more += f" {key} {sum(values) / len(values):.3f}" if values else ""
    passed = f", {sum(video['passed'] for video in videos)} of {len(videos)} passed" if videos else ""
    return f"error {row['error']:.4f}{more}{passed} ({row['seconds']:.1f} s)"


def numbered(text):
    """ "0.97=FILE" -> (0.97, Path)."""
    number, equals, path = text.partition("=")
    try:
        number = float(number)
    except ValueError:
        equals = ""
    if not equals or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not NUMBER=FILE, such as 0.97=lora.safetensors")
    if not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {path}")
    return number, Path(path)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of the miniature's transformer and VAE")
    parser.add_argument("--router", help="router file of stage 1")
    parser.add_argument(
        "--lora", nargs="+", type=numbered, default=[], help="SPARSITY=FILE: LoRAs of stage 2, their routers beside"
    )
    parser.add_argument("--few-lora", nargs="+", type=numbered, default=[], help="STEPS=FILE: distilled LoRAs")
    parser.add_argument("--peers", help="folder with comfy-kitchen, for sol_attn")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/real-length-<card>.json")
    parser.add_argument(
        "--dense-videos",
        type=Path,
        help="folder that keeps dense videos, 0.2 GB each: the next run of the same model does not sample them",
    )
    parser.add_argument("--minutes", type=float, help="no row is begun after so many")
    parser.add_argument("--sparsities", type=lists.numbers, default=[0.97, 0.99, 0.9, 0.95],
                        help="the main one first")  # fmt: skip
    parser.add_argument("--prompts", type=int, default=8, help="videos of a main row")
    parser.add_argument("--few-prompts", type=int, default=2, help="videos of the others in 8 bit")
    parser.add_argument(
        "--recorded", type=int, default=3, help="captions whose calls are recorded for the attention error"
    )
    parser.add_argument("--calls-per-video", type=int, default=4, help="model calls recorded of each")
    parser.add_argument("--loss-clips", type=int, default=6)
    parser.add_argument("--levels", type=int, default=8, help="noise levels of the validation loss")
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument(
        "--cfg", type=float, default=GUIDANCE, help="guidance of the full runs; distilled ones have none"
    )
    parser.add_argument("--shift", type=float, default=SHIFT)
    for name, value in (("frames", 81), ("height", 480), ("width", 832)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument(
        "--only", nargs="+", default=[""], help="texts: rows whose name has one of them, such as 'stage 2'"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--table", action="store_true", help="print the table of --out")
    parser.add_argument(
        "--docs", type=Path, help="with --table: a document, such as docs/QUALITY.md, that takes it between its marks"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a random miniature: --router and LoRAs must be of its size"
    )
    args = parser.parse_args(argv)
    args.lora, args.few_lora = dict(args.lora), {int(steps): path for steps, path in args.few_lora}
    if args.tiny:
        args.sampling_steps, args.prompts, args.few_prompts, args.recorded, args.loss_clips = 2, 1, 1, 1, 1
        args.levels, args.calls_per_video = 1, 2
    if args.sampling_steps in args.few_lora:
        parser.error(f"--few-lora {args.sampling_steps}: the full run has as many steps, so its rows would be the same")
    args.recorded = min(args.recorded, args.prompts)
    if args.dense_videos:
        try:
            args.dense_videos.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--dense-videos {args.dense_videos} is no folder: {error.strerror}")
    if args.out is None:
        args.out = results.RESULTS / f"real-length-{results.card_file(environment(args.device)['card']).name}"
    return args


def main(argv=None):
    args = parse(argv)
    if args.table:
        table = real_length_markdown(results.measured(args.out))
        print(table)
        if args.docs:
            text = insert(args.docs.read_text(encoding="utf-8"), "real length", table)
            args.docs.write_text(text, encoding="utf-8")
        return
    use_device(args.device)
    add_peer_folders(args.peers)
    few = sorted(args.few_lora) or ([] if args.tiny else [4, 8])
    jobs = plan(args.sparsities, args.sampling_steps, few, args.prompts, args.few_prompts)
    jobs = [job for job in jobs if any(text in str(job) for text in args.only) or job.variant == names.DENSE]
    with attention_backend("cudnn", torch.device(args.device)):
        content = measure_all(args, jobs)
    print("\n" + real_length_markdown(content))


if __name__ == "__main__":
    sys.exit(main())
