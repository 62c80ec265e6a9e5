"""The presets of SLA2 Apply Attention on the miniature, in ComfyUI's own sampler: how far each moves a video from the dense one.

    python -m benchmarks.preset_quality --comfyui PATH                on a GPU or a CPU
    python -m benchmarks.preset_quality --comfyui PATH --tiny         a few tokens and steps: tries the script
    python -m benchmarks.preset_quality --table                       the table of --out, nothing is measured

Every preset runs at the numbers of steps it is meant for beside a dense run of as many: 20 with guidance, 8 and 4 with
the LoRAs for them, without guidance. Presets meant for a trained router run with the miniature's,
*automatic* with it and without, the others without. Beside the presets: sparsities of few-step runs without a router, the
first step dense. Writes <out>.json after each row: share of self-attention that was skipped over the run, relative error of
the final latents, PSNR and SSIM of the decoded videos, and whether they pass the image test (miniature/objects.py).
Rows that the file has are not measured again.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from miniature.captions import split_captions
from miniature.objects import examine
from miniature.sample import GUIDANCE, load_models
from miniature.vae import psnr
from tooling.comfyui import find_comfyui

from . import results
from .measure import environment
from .miniature_in_comfyui import MiniatureInComfyUI
from .video_metrics import ssim

SEED = 12000
# 81 frames of 832 x 480, 32,760 tokens
LATENT, TINY = (21, 60, 104), (3, 16, 16)
LONG = 20  # steps, with guidance
SAMPLER = "euler"  # with uni_pc, as in the Wan templates, one of six dense videos of 20 steps passed the image test
STEPS_OF = {"20-50": (LONG,), "4-8": (8, 4), "4-50": (LONG, 8, 4)}  # of a preset, by what it is meant for
SWEPT = (0.95, 0.93, 0.97, 0.85)  # in the order of their value


@dataclass(frozen=True)
class Trial:
    """One row. trained: with the miniature's router. target_error, plans_itself: as in nodes.settings.AttentionSettings."""

    name: str
    steps: int
    trained: bool = False
    sparsity: float = 0.0
    schedule: str = ""
    target_error: float = 0.0
    plans_itself: bool = False

    @property
    def key(self):
        return self.name, self.steps, self.trained


def trials(presets, swept=SWEPT):
    """Every Trial, in the order of its value."""
    found = [Trial("automatic", steps, plans_itself=True) for steps in (8, 4, LONG)]
    for preset in presets:
        for steps in STEPS_OF[preset.steps]:
            settings = preset.sparsity, preset.schedule, preset.target_error
            found.append(Trial(preset.name, steps, preset.trained, *settings))
    found += [Trial("automatic", steps, trained=True, plans_itself=True) for steps in (8, 4, LONG)]
    for sparsity in swept:
        found += [Trial(f"{sparsity:g}, step 1 dense", steps, False, sparsity, "step 1: dense") for steps in (8, 4)]
    return found


def main(argv=None):
    args = parse(argv)
    if args.table:
        print(markdown(results.measured(args.out)))
        return
    bench = Bench(args)
    content = bench.started()
    have = {(row["name"], row["steps"], row["trained"]) for row in content["rows"]}
    presets = bench.miniature.module("nodes.settings.presets").PRESETS
    for trial in trials(presets, SWEPT[:1] if args.tiny else SWEPT):
        if trial.key in have or (args.tiny and trial.steps == 4):
            continue
        if args.minutes and time.monotonic() - bench.begin > 60 * args.minutes:
            print(f"{args.minutes:g} minutes are over: the same command goes on")
            break
        content["rows"].append(bench.measure(trial))
        content["dense"] = {str(steps): passed for steps, passed in sorted(bench.passed.items())} | content["dense"]
        results.save(args.out, content)
    print("\n" + markdown(content))


class Bench:
    """ComfyUI with the miniature; dense runs are made when the first row of as many steps needs them."""

    def __init__(self, args):
        self.args, self.begin = args, time.monotonic()
        self.miniature = MiniatureInComfyUI(args.comfyui, args.device)
        self.start, self.vae = self.miniature.load(), load_models(device=args.device)[1]
        captions = split_captions()[1]
        self.captions = [captions[i * len(captions) // args.prompts] for i in range(args.prompts)]
        self.dense, self.passed = {}, {}

    def started(self):
        content = results.load(self.args.out)
        kept = {"prompts": self.args.prompts, "tokens": tokens(self.args)}
        if any(content.get(name, value) != value for name, value in kept.items()):
            raise ValueError(f"{self.args.out} was measured with other prompts or tokens: give another --out.")
        return {"dense": {}, "rows": []} | content | kept | {"environment": environment(self.args.device)}

    def model(self, steps):
        """(model, guidance) of a run of so many steps."""
        return (self.start, self.args.cfg) if steps == LONG else (self.miniature.few_steps(self.start, steps), 1.0)

    def sample(self, patched, steps, cfg, number):
        sigmas = noise_levels(patched, min(steps, 3) if self.args.tiny else steps)
        latent = TINY if self.args.tiny else LATENT
        caption = str(self.captions[number])
        return self.miniature.sample(patched, sigmas, SAMPLER, caption, cfg, seed=SEED + number, latent=latent)

    def dense_runs(self, steps):
        """[(latents, video)] of every caption; ``passed`` has how many of the videos pass the image test."""
        if steps not in self.dense:
            model, cfg = self.model(steps)
            outs = [self.sample(model, steps, cfg, number) for number in range(len(self.captions))]
            videos = [decoded(self.vae, out).half() for out in outs]
            pairs = zip(videos, self.captions, strict=True)
            self.passed[steps] = sum(examine(video.float(), caption).passed for video, caption in pairs)
            self.dense[steps] = list(zip(outs, videos, strict=True))
        return self.dense[steps]

    def measure(self, trial):
        wanted = self.dense_runs(trial.steps)
        model, cfg = self.model(trial.steps)
        rows = []
        for number, caption in enumerate(self.captions):
            patched = patched_by(self.miniature, model, trial)
            out = self.sample(patched, trial.steps, cfg, number)
            video = decoded(self.vae, out)
            verdict = examine(video, caption)
            found = {"passed": verdict.passed, "frames_right": verdict.share}
            rows.append({"skipped": skipped(patched), **likeness(out, video, *wanted[number]), **found})
        mean = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        row = vars(trial) | {"sampler": SAMPLER, "cfg": cfg, **mean, "passed": sum(row["passed"] for row in rows)}
        print(f"{time.monotonic() - self.begin:4.0f} s  {line(row, len(rows))}", flush=True)
        return row


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", default=find_comfyui()[1], type=Path)
    parser.add_argument("--prompts", type=int, default=6, help="held-out captions, one video each")
    parser.add_argument("--minutes", type=float, help="no row is begun after so many")
    parser.add_argument("--cfg", type=float, default=GUIDANCE, help="guidance of the runs of 20 steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=results.RESULTS / "presets.json")
    parser.add_argument("--table", action="store_true", help="print the table of --out")
    parser.add_argument("--tiny", action="store_true")
    return parser.parse_args(argv)


def tokens(args):
    frames, height, width = TINY if args.tiny else LATENT
    return frames * height * width // 4


def noise_levels(model, steps):
    """ComfyUI's own "simple" schedule of the model."""
    import comfy.samplers

    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)


def patched_by(miniature, model, trial):
    layers = len(model.model.diffusion_model.blocks)
    parse_layers = miniature.module("nodes.settings.values").parse_layers
    rules = miniature.module("nodes.settings.schedule").parse_schedule(trial.schedule, layers, parse_layers)
    chosen = {name: getattr(trial, name) for name in ("sparsity", "target_error", "plans_itself")}
    return miniature.patched(model, miniature.router() if trial.trained else None, schedule=rules, **chosen)


def skipped(patched):
    """Share of the run's self-attention that was skipped, calls that ran dense counted in."""
    layers = patched.get_attachment("sla2").runs.finished()[-1].layers.values()
    calls = sum(layer.sparse + layer.dense.total() for layer in layers)
    return sum(layer.sparse * layer.sparsity for layer in layers if layer.sparse) / calls


@torch.inference_mode()
def decoded(vae, latents):
    """The video (3, F, H, W); ComfyUI hands latents out as the VAE made them."""
    return vae.decode(latents.float().to(next(vae.parameters()).device))[0].float()


def likeness(latents, video, dense_latents, dense_video):
    error = ((latents - dense_latents).norm() / dense_latents.norm()).item()
    dense_video = dense_video.float()
    return {"latent_error": error, "psnr": float(psnr(video, dense_video)), "ssim": float(ssim(video, dense_video))}


def line(row, of):
    return (
        f"{row['name']}, {row['steps']} steps, {'trained router' if row['trained'] else 'no router'}: skipped {100 * row['skipped']:.0f}%, "
        f"latent error {row['latent_error']:.3f}, PSNR {row['psnr']:.1f} dB, SSIM {row['ssim']:.3f}, {row['passed']} of {of} right"
    )


def markdown(content):
    """One row per trial, by number of steps."""
    lines = [
        "| steps | preset | router | self-attention skipped | latent error | PSNR dB | SSIM | frames right | videos right |",
        "|---" * 9 + "|",
    ]
    of = content["prompts"]
    for steps, passed in sorted(content["dense"].items(), key=lambda item: -int(item[0])):
        lines.append(f"| {steps} | dense | - | 0% | 0 | - | - | - | {passed} of {of} |")
        for row in content["rows"]:
            if row["steps"] == int(steps):
                lines.append(
                    f"| {steps} | {row['name']} | {'trained' if row['trained'] else 'none'} | {100 * row['skipped']:.0f}% | "
                    f"{row['latent_error']:.3f} | {row['psnr']:.1f} | {row['ssim']:.3f} | {100 * row['frames_right']:.0f}% | "
                    f"{row['passed']} of {of} |"
                )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
