"""The presets of SLA2 Apply Attention on the miniature, in ComfyUI's own sampler: how far each moves a video from the dense one.

    python -m benchmarks.preset_quality --comfyui PATH                on a GPU or a CPU
    python -m benchmarks.preset_quality --comfyui PATH --tiny         a few tokens and steps: tries the script

Every preset runs at its own number of sampling steps beside a dense run of as many: those of 20 steps with guidance, those of
8 with the miniature's distilled LoRA and without. Presets meant for a trained router run with the miniature's, the others without. Writes <out>.json and prints a table: share of self-attention that was skipped over the run,
relative error of the final latents, PSNR and SSIM of the decoded videos.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from miniature.captions import split_captions
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
FEW = 8  # steps: with the LoRA that was distilled for them
# what each number of steps is run with; the longer ones as most people sample Wan
RUNS = {"20-50": (20, "uni_pc"), "4-8": (FEW, "euler"), "4-50": (20, "uni_pc")}


def main(argv=None):
    args = parse(argv)
    miniature = MiniatureInComfyUI(args.comfyui, args.device)
    start, vae = miniature.load(), load_models(device=args.device)[1]
    few = miniature.few_steps(start, FEW)
    captions = [str(caption) for caption in split_captions()[1]]
    captions = [captions[i * len(captions) // args.prompts] for i in range(args.prompts)]
    path = args.out
    content = {"environment": environment(args.device), "prompts": args.prompts, "tokens": tokens(args), "rows": []}
    dense = {}
    for preset in miniature.module("nodes.settings.presets").PRESETS:
        steps, sampler = RUNS[preset.steps]
        model, cfg = (few, 1.0) if steps == FEW else (start, args.cfg)
        steps = 4 if args.tiny else steps
        kept = dense.setdefault(preset.steps, {})
        rows = []
        for number, caption in enumerate(captions):

            def sample(patched, caption=caption, number=number, steps=steps, sampler=sampler, cfg=cfg):
                sigmas = noise_levels(patched, steps)
                latent = TINY if args.tiny else LATENT
                return miniature.sample(patched, sigmas, sampler, caption, cfg, seed=SEED + number, latent=latent)

            if number not in kept:
                out = sample(model)
                kept[number] = out, decoded(vae, out)
            patched = patched_by(miniature, model, preset)
            out = sample(patched)
            rows.append({"skipped": skipped(patched), **likeness(out, decoded(vae, out), *kept[number])})
            print(f"{preset.name}: {caption}: {rows[-1]}", flush=True)
        mean = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        content["rows"].append({**asdict(preset), "sampling_steps": steps, "sampler": sampler, "cfg": cfg, **mean})
        results.save(path, content)
    print("\n" + markdown(content))


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", default=find_comfyui()[1], type=Path)
    parser.add_argument("--prompts", type=int, default=3, help="held-out captions, one video each")
    parser.add_argument("--cfg", type=float, default=GUIDANCE, help="guidance of the runs of 20 steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=results.RESULTS / "presets.json")
    parser.add_argument("--tiny", action="store_true")
    return parser.parse_args(argv)


def tokens(args):
    frames, height, width = TINY if args.tiny else LATENT
    return frames * height * width // 4


def noise_levels(model, steps):
    """ComfyUI's own "simple" schedule of the model."""
    import comfy.samplers

    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)


def patched_by(miniature, model, preset):
    layers = len(model.model.diffusion_model.blocks)
    parse_layers = miniature.module("nodes.settings.values").parse_layers
    rules = miniature.module("nodes.settings.schedule").parse_schedule(preset.schedule, layers, parse_layers)
    router = miniature.router() if preset.trained else None
    chosen = {"sparsity": preset.sparsity, "schedule": rules, "target_error": preset.target_error}
    return miniature.patched(model, router, **chosen)


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
    return {"latent_error": error, "psnr": float(psnr(video, dense_video)), "ssim": float(ssim(video, dense_video))}


def markdown(content):
    """One row per preset."""
    lines = [
        "| preset | steps | router | attention skipped | latent error | PSNR dB | SSIM |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in content["rows"]:
        lines.append(
            f"| {row['name']} | {row['sampling_steps']} | {'trained' if row['trained'] else 'none'} | "
            f"{100 * row['skipped']:.0f}% | {row['latent_error']:.3f} | {row['psnr']:.1f} | {row['ssim']:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
