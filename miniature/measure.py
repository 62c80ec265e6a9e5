"""Sample held-out captions and test every video for its objects (miniature/objects.py).

    python -m miniature.measure --out FOLDER                         24 captions, 81 frames of 832 x 480, 20 steps, dense
    python -m miniature.measure --out FOLDER --source rendered       the same scenes drawn by the renderer: what a perfect model gets
    python -m miniature.measure --out FOLDER --source vae            the same through the VAE alone

Prints one line per caption and writes measure.json (every check of every caption, mean loss if asked for) and measure.png,
eight frames of each video. The colour drift is that of --source vae: mean colour error by frame, in 255ths.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from . import images, scaled, videos
from .captions import Caption, embed, split_captions
from .objects import CHECKS, examine
from .pool import fill_pool
from .sample import WEIGHTS, add_video_arguments, load_models, sample_latents
from .train_dit import validation_loss
from .vae import denormalise_latents, psnr

SEED = 5000


def rendered(caption: Caption, size: tuple[int, int, int], seed: int, device) -> torch.Tensor:
    """(1, 3, F, H, W): the renderer's video of a caption."""
    frames, height, width = size
    scene = scaled.simulate([caption], frames=frames, height=height, width=width, seed=seed).to(device)
    return videos.render(scene, frames=frames, height=height, width=width)


class Source:
    """Makes videos (3, F, H, W) for captions: "model", "vae" or "rendered"."""

    def __init__(self, args):
        self.args, self.device = args, torch.device(args.device)
        self.size = (args.frames, args.height, args.width)
        self.model, self.vae = (
            load_models(args.weights, self.device, args.lora) if args.source != "rendered" else (None, None)
        )

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type != "cpu")

    @torch.no_grad()
    def video(self, caption: Caption, seed: int) -> torch.Tensor:
        if self.args.source == "model":
            frames, height, width = self.size
            with self.autocast():
                latents = sample_latents(
                    self.model, embed(str(caption)), shape=(1, 16, (frames + 3) // 4, height // 8, width // 8),
                    seed=seed, steps=self.args.steps, cfg=self.args.cfg, shift=self.args.shift, device=self.device,
                )  # fmt: skip
                return self.vae.decode(denormalise_latents(latents))[0].float()
        clip = rendered(caption, self.size, seed, self.device)
        if self.args.source == "rendered":
            return clip[0]
        with self.autocast():
            return self.vae.decode(self.vae.encode(clip))[0].float()

    def loss(self, clips: int) -> float:
        """Flow-matching loss of the model on held-out captions at this size."""
        held_out = split_captions()[1]
        chosen = [i * len(held_out) // clips for i in range(clips)]
        data = fill_pool(self.vae, held_out, chosen, size=self.size, seed=SEED + 1, device=self.device)
        contexts = torch.cat([embed(str(caption)) for caption in held_out]).to(self.device)
        return validation_loss(self.model, data, contexts)


def against_truth(video: torch.Tensor, truth: torch.Tensor) -> dict:
    """PSNR in dB, and the mean colour error of each frame in 255ths (the worst of the three channels)."""
    drift = (video - truth).mean((2, 3)).abs().amax(0) * 127.5
    return {"psnr_db": psnr(video, truth), "colour_error": [round(value, 2) for value in drift.tolist()]}


def measure(source: Source, captions: list[Caption], out: Path) -> dict:
    """Test one video per caption, write the contact sheet, and return what is reported."""
    rows, shown = [], []
    for number, caption in enumerate(captions):
        begin = time.monotonic()
        video = source.video(caption, SEED + number)
        verdict = examine(video, caption)
        row = {"caption": str(caption), "passed": verdict.passed, "frames_passed": verdict.share} | verdict.shares()
        row |= {"counts": verdict.counts.tolist(), "seconds": time.monotonic() - begin}
        if source.args.source == "vae":
            row |= against_truth(video, rendered(caption, source.size, SEED + number, source.device)[0])
        rows.append(row)
        print(line(row), flush=True)
        moments = torch.linspace(0, video.shape[1] - 1, 8).round().long()
        shown.append(video[:, moments.to(video.device)].cpu())
    report = {"passed": sum(row["passed"] for row in rows), "of": len(rows), "size": source.size,
              "source": source.args.source, "steps": source.args.steps, "cfg": source.args.cfg,
              "shift": source.args.shift, "lora": source.args.lora and source.args.lora.name, "rows": rows}  # fmt: skip
    if source.args.loss_clips:
        report["validation_loss"] = source.loss(source.args.loss_clips)
    images.write_png(out / "measure.png", images.contact_sheet(shown, shrink=max(1, source.size[1] // 120)))
    (out / "measure.json").write_text(json.dumps(report, indent=1))
    return report


def line(row: dict) -> str:
    """One caption's result as text."""
    checks = "  ".join(f"{check} {row[check]:.2f}" for check in CHECKS)
    more = f"  {row['psnr_db']:.1f} dB, colour error up to {max(row['colour_error']):.1f}" if "psnr_db" in row else ""
    return f"{'pass' if row['passed'] else 'FAIL'} {row['frames_passed']:.2f}  {checks}{more}  {row['caption']}"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for measure.json and measure.png")
    parser.add_argument("--source", choices=("model", "vae", "rendered"), default="model", help="what makes the videos")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of the transformer and VAE files")
    parser.add_argument(
        "--lora", type=Path, help="LoRA file to merge, for example distil's: with its --steps and --cfg 1"
    )
    parser.add_argument("--captions", type=int, default=24, help="how many of the 24 held-out captions")
    add_video_arguments(parser, height="a multiple of 16, at least 128")
    parser.add_argument("--loss-clips", type=int, default=0, help="clips for the flow-matching loss; 0 leaves it out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if not 1 <= args.captions <= len(split_captions()[1]):
        parser.error(f"--captions {args.captions}: there are {len(split_captions()[1])} held-out captions")
    if args.loss_clips and args.source != "model":
        parser.error(f"--loss-clips needs --source model, not {args.source}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    held_out = split_captions()[1]
    captions = [held_out[i * len(held_out) // args.captions] for i in range(args.captions)]
    report = measure(Source(args), captions, args.out)
    loss = f", validation loss {report['validation_loss']:.4f}" if "validation_loss" in report else ""
    print(f"{report['passed']} of {report['of']} captions passed{loss}")


if __name__ == "__main__":
    main()
