"""Generate videos with the miniature, without ComfyUI.

    python -m miniature.sample --out samples --caption "two red balls bounce over tiles, camera still"

writes a contact sheet (samples.png) of all captions and one animated WebP per caption.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable
from pathlib import Path

import torch

from . import images
from .captions import embed, split_captions
from .lora import load_lora, merge_lora
from .vae import WanVAE, denormalise_latents
from .wan import Attention, WanConfig, WanModel, dense_attention
from .weight_files import WEIGHTS, weight_file

# what the shipped weights are measured with. SHIFT: ComfyUI's ModelSamplingSD3; its default for Wan2.1 is 8.
SHIFT, GUIDANCE = 12.0, 5.0


def noise_schedule(steps: int, shift: float = SHIFT) -> torch.Tensor:
    """(steps + 1,) noise levels from 1 to 0, evenly spaced before the shift towards noise."""
    u = torch.linspace(1, 0, steps + 1)
    return shift * u / (1 + (shift - 1) * u)


@torch.no_grad()
def sample_latents(
    model: WanModel, context: torch.Tensor, *, shape: tuple[int, ...], seed: int, steps: int = 20, cfg: float = GUIDANCE,
    shift: float = SHIFT, device: torch.device | str = "cpu", attention: Attention = dense_attention,
) -> torch.Tensor:  # fmt: skip
    """Normalised latents (1, 16, T, h, w) by Euler steps along the flow; noise is drawn on the CPU, so seeds carry over.

    Args:
        context: (1, 16, 4096) from captions.embed().
        shape: of the latents.
        cfg: guidance scale; 1 turns guidance off, and a step calls the model once instead of twice.
        attention: see WanModel.forward.
    """
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    context = context.to(device)
    empty = torch.zeros_like(context)
    levels = noise_schedule(steps, shift).tolist()
    for level, following in itertools.pairwise(levels):
        t = torch.full((shape[0],), level * 1000, device=device)
        velocity = model(x, t, context, attention).float()
        if cfg != 1:
            base = model(x, t, empty, attention).float()
            velocity = base + cfg * (velocity - base)
        x = x + (following - level) * velocity
    return x


def load_models(
    folder: Path = WEIGHTS, device: torch.device | str = "cpu", lora: Path | None = None
) -> tuple[WanModel, WanVAE]:
    """The trained transformer and VAE in float32, ready to use; a LoRA file is merged into the transformer.

    Raises:
        FileNotFoundError: the weight files are not in the folder, or the LoRA is not there.
        ValueError: the LoRA is not one of this transformer.
    """
    from safetensors.torch import load_file

    state = {k: v.float() for k, v in load_file(weight_file("wan_miniature_dit.safetensors", folder)).items()}
    state = merge_lora(state, load_lora(lora)) if lora else state
    model = WanModel(WanConfig.from_state_dict(state))
    model.load_state_dict(state)
    vae = WanVAE.from_state_dict(load_file(weight_file("wan_miniature_vae.safetensors", folder)))
    return model.to(device).eval(), vae.to(device).eval()


def with_loras(model: WanModel, paths: Iterable[Path]) -> WanModel:
    """A copy of the transformer, on its device and ready to use, with LoRA files merged into it.

    Raises:
        ValueError: a LoRA is not one of this transformer.
    """
    state = model.state_dict()
    for path in paths:
        state = merge_lora(state, load_lora(path))
    merged = WanModel(model.config).to(next(model.parameters()).device).eval()
    merged.load_state_dict(state)
    return merged


def add_video_arguments(parser: argparse.ArgumentParser, height: str = "a multiple of 16") -> None:
    """The size of a video and how it is sampled: --frames, --height, --width, --steps, --cfg, --shift."""
    parser.add_argument("--frames", type=int, default=81, help="4n+1")
    parser.add_argument("--height", type=int, default=480, help=height)
    parser.add_argument("--width", type=int, default=832, help="a multiple of 16, at least the height")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=GUIDANCE, help="guidance scale; 1 turns guidance off")
    parser.add_argument("--shift", type=float, default=SHIFT, help="of the noise levels, ComfyUI's ModelSamplingSD3")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--lora", type=Path, help="LoRA file to merge into the transformer, for example distil's")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--caption", action="append", help="may be repeated; default: four held-out captions")
    add_video_arguments(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    model, vae = load_models(args.weights, args.device, args.lora)
    captions = args.caption or [str(caption) for caption in split_captions()[1][::6]]
    shape = (1, 16, (args.frames - 1) // 4 + 1, args.height // 8, args.width // 8)
    args.out.mkdir(parents=True, exist_ok=True)
    results = []
    for number, caption in enumerate(captions):
        with (
            torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.device != "cpu"),
            torch.no_grad(),
        ):
            latents = sample_latents(model, embed(caption), shape=shape, seed=args.seed + number, steps=args.steps,
                                     cfg=args.cfg, shift=args.shift, device=args.device)  # fmt: skip
            results.append(vae.decode(denormalise_latents(latents))[0].float().cpu())
        images.write_webp(args.out / f"sample_{number}.webp", results[-1])
        print(f"sample_{number}.webp: {caption}")
    images.write_png(args.out / "samples.png", images.contact_sheet(results))


if __name__ == "__main__":
    main()
