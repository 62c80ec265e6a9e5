"""Trains the VAE's decoder on long clips, so that colours do not drift; the encoder, and with it every latent, stays.

The VAE was trained on 17 frames at most, and its decoder's causal convolutions meet other statistics from about the 24th
frame on. Here the decoder sees windows of clips that were encoded whole: all 81 frames of a small window, and few frames
of whole pictures for its attention within a frame.
"""

from __future__ import annotations

import math
import time

import torch

from . import videos
from .optim import Average, Budget, Log, Optimiser
from .pool import Pool
from .train_vae import is_hidden_convolution
from .vae import WanVAE, denormalise_latents

LATENT_NOISE = 0.05  # what a sampled latent is off by at least; about the posterior's own noise


def window(
    pool: Pool, index: torch.Tensor, frames: int, side: int | None, generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """(latents, video) of the first frames of some clips, in a random square window of `side` latents (None: all).

    Args:
        index: (B,) clips.
        frames: latent frames; they decode to 4 * frames - 3 of the video.
    """
    height, width = pool.latents.shape[-2:]
    rows, columns = (height, width) if side is None else (min(side, height), min(side, width))
    top = int(torch.randint(height - rows + 1, (), generator=generator))
    left = int(torch.randint(width - columns + 1, (), generator=generator))
    latents = pool.latents[index, :, :frames, top : top + rows, left : left + columns].float()
    origin = torch.tensor([[8 * left, 8 * top]], device=latents.device).expand(len(index), 2)
    video = videos.render(
        pool.scenes.select(index), frames=4 * frames - 3, origin=origin, height=8 * rows, width=8 * columns
    )
    return latents, video


def tune_decoder(
    vae: WanVAE, batches, *, budget: Budget, lr: float, generator, log: Log, print_seconds=5.0, share: float = 1.0
) -> int:
    """Train in turns on batches [(pool, clips, latent frames, window side or None)]; the averaged weights stay in the VAE.

    share: how far the VAE's weights go from those before to those after. Short clips lose a little by the training, and
        least where the weights stop short of its end, which takes nearly as much of the drift away.

    Returns the number of steps.
    """
    device = batches[0][0].latents.device
    vae.requires_grad_(False)
    trained = torch.nn.ModuleDict({"decoder": vae.decoder, "conv2": vae.conv2}).requires_grad_(True)
    optimiser = Optimiser(trained, is_hidden_convolution, muon_lr=lr, adam_lr=lr, hold=0.3)
    average = Average(trained, 0.995)
    before = {name: value.detach().clone() for name, value in trained.named_parameters()}
    step, printed, errors = 0, time.monotonic(), []
    while (progress := budget.progress(step)) < 1:
        pool, clips, frames, side = batches[step % len(batches)]
        index = torch.randint(len(pool), (clips,), generator=generator).to(device)
        latents, video = window(pool, index, frames, side, generator)
        latents = latents + LATENT_NOISE * torch.randn_like(latents)
        with torch.autocast(device.type, torch.bfloat16):
            error = vae.decode(denormalise_latents(latents)).float() - video
        mse = error.square().mean()
        (error.abs().mean() + 4 * mse).backward()
        factor = optimiser.step(progress)
        average.update()
        step += 1
        errors.append(mse.detach())
        if time.monotonic() - printed > print_seconds or budget.progress(step) >= 1:
            quality = -10 * torch.log10(torch.stack(errors).mean() / 4).item()
            log.record(stage="decoder", seconds=budget.elapsed(), step=step, psnr_db=quality, lr=factor)
            if not math.isfinite(quality):
                raise FloatingPointError(f"decoder training diverged at step {step}: lower --decoder-lr (now {lr})")
            printed, errors = time.monotonic(), []
    trained.load_state_dict({k: torch.lerp(before[k], after, share) for k, after in average.state_dict().items()})
    vae.requires_grad_(False)
    return step
