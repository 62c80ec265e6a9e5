"""Training data without videos: latents that the dense model itself makes from texts. Distillation needs no others.

    python -m sla2_training.stage2.samples --config stage2.json --texts texts.safetensors --size 81x480x832

texts.safetensors holds "context" (K, L, D), the text encoder's output for K prompts, and "empty_context" (1, L, D), that of
the empty (or negative) prompt. Writes the file that the configuration names as "data".
"""

import argparse
import os
import sys

import safetensors.torch
import torch

from ..draws import noise_like
from ..errors import TrainingError
from .config import load_config
from .data import VideoLatents, check_empty, check_tensor
from .lora import replace_file
from .wan import check_fits
from .ways import euler, schedule


@torch.no_grad()
def own_samples(student, context, empty, shape, *, steps=30, guidance=5.0, shift=5.0, seed=0, say=print):
    """VideoLatents of one sample per row of context, by Euler steps along the dense model's flow with guidance.

    A video with NaN or infinity is left out and told; Ctrl-C ends with the videos that there are. Raises TrainingError where
    none came out.

    Args:
        student: Student. context: (K, L, D). empty: (1, L, D). shape: (C, T, h, w) of the latents.
    """
    device = next(student.parameters()).device
    levels = schedule(steps, shift).tolist()

    def sample(number):
        both = torch.cat([context[number : number + 1], empty]).to(device)

        def guided(x, t):
            with_text, without = (student(x, t, c[None], dense=True).float() for c in both)
            return without + guidance * (with_text - without)

        return euler(guided, noise_like(torch.empty(1, *shape, device=device), [seed + number]), levels).cpu()

    made = {}
    try:
        for number in range(len(context)):
            video = sample(number)
            if bool(torch.isfinite(video).all()):
                made[number] = video
                say(f"{number + 1} of {len(context)} videos")
            else:
                say(f"video {number + 1} is left out: NaN or infinity; a lower guidance may help")
    except KeyboardInterrupt:
        if not made:
            raise
        say(f"stopped: {len(made)} of {len(context)} videos are kept")
    if not made:
        raise TrainingError("Every video came out as NaN or infinity: lower the guidance, or look at the texts.")
    return VideoLatents(torch.cat(list(made.values())), context, torch.tensor(list(made)), empty)


def save_latents(path, data):
    """Writes VideoLatents as load_latents() reads them, whole or not at all."""
    tensors = {"latents": data.latents, "context": data.context, "caption": data.caption, "empty_context": data.empty}
    tensors = {name: t.contiguous() for name, t in tensors.items() if t is not None}
    replace_file(path, lambda draft: safetensors.torch.save_file(tensors, draft))


def latent_shape(size, channels=16):
    """(C, T, h, w) of Wan2.1's latents for "FRAMESxHEIGHTxWIDTH". Raises ValueError for sizes that Wan has not."""
    try:
        frames, height, width = (int(n) for n in size.lower().split("x"))
    except ValueError:
        raise ValueError(f"size must look like 81x480x832 (frames, height, width), got {size!r}.") from None
    if frames % 4 != 1 or height % 16 or width % 16 or min(frames, height, width) < 1:
        raise ValueError(f"size must have 4n + 1 frames and sides that are multiples of 16, got {size!r}.")
    return channels, (frames - 1) // 4 + 1, height // 8, width // 8


def main(argv=None):
    from .__main__ import load_student

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--texts", required=True)
    parser.add_argument("--size", required=True, help="FRAMESxHEIGHTxWIDTH, as 81x480x832")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    try:
        config, shape = load_config(args.config), latent_shape(args.size)
        _check_arguments(args, config)
        context, empty = load_texts(args.texts)
        student = load_student(config)
        check_fits(student.model, f"--size {args.size} or {args.texts}", shape, context.shape[1:])
        options = {"steps": args.steps, "guidance": args.guidance, "shift": config.shift, "seed": args.seed}
        data = own_samples(student.to(args.device).eval(), context, empty, shape, **options)
        save_latents(config.data, data)
    except (ValueError, OSError, TrainingError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _check_arguments(args, config):
    """Raises ValueError for what would stop the run, or lose what it made, only later."""
    if args.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {args.steps}.")
    if not 1 <= args.guidance <= 100:
        raise ValueError(f"--guidance must be 1, which is none, to 100, got {args.guidance}.")
    if not 0 <= args.seed < 2**62:
        raise ValueError(f"--seed must be at least 0 and below 2**62, got {args.seed}.")
    folder = os.path.dirname(os.path.abspath(config.data))
    if os.path.isdir(config.data) or not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"data names {config.data}, which cannot be written: make its folder, or name another file.")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:  # the latter where PyTorch is built without CUDA
        raise ValueError(f"--device {args.device} is not there ({str(error).splitlines()[0]}).") from error


def load_texts(path):
    """(context, empty_context) of a file of texts. Raises ValueError: one sentence with the file."""
    try:
        texts = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"Texts {path} cannot be read: {error}.") from error
    context, empty = (texts.get(name) for name in ("context", "empty_context"))
    check_tensor(f"Texts {path}", "context", context, 3)
    check_empty(f"Texts {path}", empty, context)
    return context, empty


if __name__ == "__main__":
    sys.exit(main())
