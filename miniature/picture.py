"""The pictures of the READMEs: held-out captions at real length, dense and with SLA2 at 97%, frame by frame. Needs Pillow.

    python -m miniature.picture --out FOLDER              on a GPU: 81 frames of 832 x 480, 32,760 tokens
    python -m miniature.picture --out FOLDER --steps 4 --cfg 1 --few-lora wan_miniature_4_steps_lora.safetensors      in few steps
    python -m miniature.picture --out FOLDER --frames 9 --height 64 --width 96 --steps 2 --sparsity 0.5 --device cpu      a trial

Writes picture.jpg: per caption a row of frames dense, one with SLA2 without a trained router (ratio fitted in the run), one
with the router and one with the LoRA of stage 2 and its router (--router none, --lora none: without). samples.jpg has six
captions, dense. picture.json says which, and how far the final latents are from the dense ones.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from sla2_kernels import load_router, sla2_attention
from sla2_kernels.fitted_attention import fitted_attention, sample_rows

from . import images
from .captions import Caption, embed, split_captions
from .sample import WEIGHTS, add_video_arguments, load_models, sample_latents, with_loras
from .vae import denormalise_latents
from .wan import dense_attention
from .weight_files import weight_file

SEED = 5000  # as miniature.measure's: the same videos
CAPTIONS = (17,)  # of the held-out ones
SAMPLES = 0, 4, 8, 12, 16, 20


class Untrained:
    """SLA2 without a router on (B, N, H, D) views: heuristic choice, own key blocks kept, the ratio fitted from 32 rows of every call."""

    def __init__(self, sparsity: float):
        self.sparsity, self.calls = sparsity, 0

    def __call__(self, layer, q, k, v):
        self.calls += 1
        rows = sample_rows(q.shape[1], self.calls, q.device)
        return fitted_attention(q, k, v, rows=rows, sparsity=self.sparsity, layout="BNHD", keep_diagonal=True).out


class Routed:
    """SLA2 with a router file, its own choice of blocks and its learned ratios, on (B, N, H, D) views."""

    def __init__(self, router, sparsity: float):
        self.router, self.sparsity = router, sparsity

    def __call__(self, layer, q, k, v):
        weights = self.router.layers[layer]
        parts = [
            part.to(q.device) for part in (weights.proj_q, weights.proj_k, self.router.ratio(layer, self.sparsity))
        ]
        kept = self.router.keep_diagonal
        return sla2_attention(q, k, v, *parts, sparsity=self.sparsity, layout="BNHD", keep_diagonal=kept)


class Studio:
    """Samples and decodes; each caption has its own noise, the same for every way to attend. few_lora: in the model, or None."""

    def __init__(self, args):
        self.args, self.device = args, torch.device(args.device)
        self.model, self.vae = load_models(args.weights, self.device, args.few_lora)

    @torch.no_grad()
    def film(self, number: int, caption: Caption, attention, model=None) -> tuple[torch.Tensor, torch.Tensor]:
        """(latents, video (3, F, H, W) on the CPU). model: in the place of its own."""
        args = self.args
        shape = (1, 16, (args.frames + 3) // 4, args.height // 8, args.width // 8)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type != "cpu"):
            latents = sample_latents(model or self.model, embed(str(caption)), shape=shape, seed=SEED + number, steps=args.steps,
                                     cfg=args.cfg, shift=args.shift, device=self.device, attention=attention)  # fmt: skip
            return latents, self.vae.decode(denormalise_latents(latents))[0].float().cpu()


def few_lora(text: str) -> Path:
    path = Path(text)
    return path if path.is_file() else weight_file(text)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--router", default=weight_file("wan_miniature_router.safetensors"), help='a file, or "none"')
    parser.add_argument(
        "--lora", default=weight_file("wan_miniature_stage2_lora.safetensors"), help='of stage 2, or "none"'
    )
    parser.add_argument("--lora-router", default=weight_file("wan_miniature_stage2_router.safetensors"))
    parser.add_argument(
        "--few-lora", type=few_lora, help="of few steps, in all rows: a file, or the name of one that is shipped"
    )
    parser.add_argument("--captions", type=int, nargs="+", default=CAPTIONS, help="numbers of held-out captions")
    parser.add_argument("--samples", type=int, nargs="*", default=SAMPLES, help="those of samples.jpg")
    parser.add_argument("--sparsity", type=float, default=0.97)
    add_video_arguments(parser)
    parser.add_argument("--shrink", type=int, default=4, help="each side of a frame is divided by this")
    parser.add_argument("--columns", type=int, default=6, help="frames per row")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    studio, held_out = Studio(args), split_captions()[1]
    ways = {"dense": (dense_attention, None), "untrained": (Untrained(args.sparsity), None)}
    if str(args.router) != "none":
        ways["router"] = Routed(load_router(args.router), args.sparsity), None
    if str(args.lora) != "none":
        ways["LoRA and router"] = (
            Routed(load_router(args.lora_router), args.sparsity),
            with_loras(studio.model, [Path(args.lora)]),
        )
    device = torch.cuda.get_device_name(studio.device) if studio.device.type == "cuda" else "CPU"
    report = {
        "sparsity": args.sparsity,
        "steps": args.steps,
        "size": [args.frames, args.height, args.width],
        "device": device,
        "rows": [],
    }
    rows = []
    for number in args.captions:
        dense = None
        for way, (attention, model) in ways.items():
            latents, video = studio.film(number, held_out[number], attention, model)
            dense = latents if dense is None else dense
            error = float((latents - dense).norm() / dense.norm())
            report["rows"].append({"caption": str(held_out[number]), "way": way, "latent_error": error})
            rows.append(video)
            print(f"{held_out[number]}: {way}, latents off by {error:.3f}", flush=True)
    images.write_jpg(args.out / "picture.jpg", images.contact_sheet(rows, args.columns, args.shrink))
    if args.samples:
        shown = [studio.film(number, held_out[number], dense_attention)[1] for number in args.samples]
        images.write_jpg(args.out / "samples.jpg", images.contact_sheet(shown, 8, args.shrink))
        report["samples"] = [str(held_out[number]) for number in args.samples]
    (args.out / "picture.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
