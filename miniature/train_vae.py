"""Train a VAE from nothing on crops of rendered clips.

    python -m miniature.train_vae --out out --minutes 3.2
    python -m miniature.train_vae --out out --tiny --steps 3 --device cpu

Writes wan_miniature_vae.safetensors, vae_log.json and vae_sheet.png. Training stops by the clock with the learning rate at zero;
weights are saved every minute, so a run that is cut off still leaves some. With --steps a run repeats step for step.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch

from . import images, scaled, videos
from .captions import split_captions
from .optim import Average, Budget, Log, Optimiser, options_of, save_weights
from .vae import Kernels, WanVAE, normalise_latents, psnr, rms_silu

ABOUT = "Wan2.1-format video VAE of small width, trained on procedural videos (miniature/README.md)"
VAE_FILE = "wan_miniature_vae.safetensors"
# world: (frames, height, width); a batch is (frames, side, clips)
REAL = {"world": (81, 320, 320), "scenes": 4096, "batches": [(17, 128, 16), (17, 128, 16), (9, 208, 12)],
        "statistics_clips": 48, "test_clips": 24}  # fmt: skip
TINY = {"world": (9, 32, 32), "scenes": 16, "batches": [(5, 16, 2), (9, 16, 1)], "statistics_clips": 2, "test_clips": 2}


def clip_batch(bank: videos.Scenes, *, batch: int, frames: int, side: int, world, generator) -> torch.Tensor:
    """Random crops in time and space, half of the room of chance around one of the objects."""
    total, height, width = world
    index = torch.randint(len(bank), (batch,), generator=generator)
    start = torch.randint(total - frames + 1, (batch,), generator=generator)
    item = torch.randint(2, (batch,), generator=generator)
    jitter = (torch.rand(batch, 2, generator=generator) - 0.5) * side
    scenes = bank.select(index.to(bank.kind.device))
    device = scenes.kind.device
    start = start.to(device)
    pick = torch.arange(batch, device=device)
    centre = scenes.position[pick, start + frames // 2, item.to(device)] + jitter.to(device)
    room = torch.tensor([width - side, height - side], device=device)
    origin = torch.minimum((centre - side / 2).round().clamp_min(0), room)
    return videos.render(scenes, first_frame=start, frames=frames, origin=origin, height=side, width=side)


def compiled_norm():
    """rms_silu as one kernel, compiled once per channel count and for any number of positions."""
    fused = torch.compile(rms_silu, dynamic=False)

    def norm(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)
        torch._dynamo.maybe_mark_dynamic(rows, 0)
        return fused(rows, gamma).view_as(x)

    return norm


def choose_kernels(device: torch.device, compile_: bool) -> str:
    """Take compiled norms if asked for, and the faster of two equal ways to run the widest convolution here."""
    if compile_:
        Kernels.norm = compiled_norm()
    if device.type != "cuda":
        return "3-D convolution"
    from .vae import CausalConv

    conv = CausalConv(16, 16, 3).to(device)
    x = torch.randn(8, 17, 128, 128, 16, device=device, requires_grad=True)
    seconds = {}
    for stacked in (False, True):
        Kernels.stack_frames = stacked
        for repeat in range(6):
            if repeat == 2:
                torch.cuda.synchronize(device)
                begin = time.monotonic()
            with torch.autocast(device.type, torch.bfloat16):
                conv(x).float().mean().backward()
        torch.cuda.synchronize(device)
        seconds[stacked] = (time.monotonic() - begin) / 4
    Kernels.stack_frames = seconds[True] < seconds[False]
    name = "2-D convolution of stacked frames" if Kernels.stack_frames else "3-D convolution"
    return f"{name} (3-D {seconds[False] * 1e3:.1f} ms, stacked {seconds[True] * 1e3:.1f} ms)"


def is_hidden_convolution(name: str, p: torch.Tensor) -> bool:
    """Whether Muon trains this parameter of a VAE: convolutions but those to and from pixels."""
    return p.ndim >= 4 and min(p.shape[:2]) > 3


def train_vae(args, sizes: dict, budget: Budget, log: Log, device: torch.device) -> WanVAE:
    """Train, fold the latent statistics in, save, measure; returns the saved weights' model."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    train_captions, held_out = split_captions()
    world = sizes["world"]
    scenes = [train_captions[i % len(train_captions)] for i in range(sizes["scenes"])]
    bank = scaled.simulate(scenes, frames=world[0], height=world[1], width=world[2], seed=args.seed).to(device)

    vae = WanVAE(args.dim).to(device)
    optimiser = Optimiser(vae, is_hidden_convolution, muon_lr=args.lr, adam_lr=args.lr, hold=0.4)
    average = Average(vae, 0.998)
    saved = printed = time.monotonic()
    step = pixels = 0
    while (progress := budget.progress(step)) < 1:
        frames, side, batch = sizes["batches"][step % len(sizes["batches"])]
        clip = clip_batch(bank, batch=batch, frames=frames, side=side, world=world, generator=generator)
        with torch.autocast(device.type, torch.bfloat16):
            mean, log_variance = vae.posterior(clip)
            mean, log_variance = mean.float(), log_variance.float()
            latents = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
            error = vae.decode(latents).float() - clip
        mse = error.square().mean()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        (error.abs().mean() + 4 * mse + args.kl_weight * kl).backward()
        factor = optimiser.step(progress)
        average.update()
        step += 1
        pixels += clip[:, 0].numel()
        now = time.monotonic()
        if now - printed > args.print_seconds:
            quality = -10 * torch.log10(mse.detach() / 4).item()
            state = {"psnr_db": quality, "kl": kl.item(), "lr": factor}
            speed = pixels / (now - printed) / 1e6
            log.record(stage="vae", seconds=budget.elapsed(), step=step, **state, megapixels_per_second=speed)
            if not math.isfinite(quality):
                raise FloatingPointError(f"VAE training diverged at step {step}: lower --lr (now {args.lr})")
            printed, pixels = now, 0
        if now - saved > 60:
            saved = now
            save_weights(args.out / VAE_FILE, average.state_dict(), torch.float16, ABOUT)
            log.write()

    vae.load_state_dict(average.state_dict())
    vae.eval()
    return _finish(vae, args, sizes, log, device, bank, held_out, step)


@torch.no_grad()
def _finish(vae, args, sizes, log, device, bank, held_out, steps) -> WanVAE:
    """Fold the statistics, round to 16 bit, save, then measure the rounded weights on clips of held-out captions."""
    frames, height, width = sizes["world"]
    count = sizes["statistics_clips"]
    chosen = torch.randperm(len(bank), generator=torch.Generator().manual_seed(args.seed))[:count].to(device)
    means, variances = [], []
    for i in chosen:
        clip = videos.render(bank.select(i[None]), frames=frames, height=height, width=width)
        with torch.autocast(device.type, torch.bfloat16):
            code, log_variance = vae.posterior(clip)
        means.append(code.float())
        variances.append(log_variance.float().exp().mean((0, 2, 3, 4)))
    latents = torch.cat(means)
    mean, noise = latents.mean((0, 2, 3, 4)), torch.stack(variances).mean(0)
    # With the posterior's own noise counted, a channel that carries nothing stays small instead of being blown up.
    std = (latents.var((0, 2, 3, 4)) + noise).sqrt()
    log.result(
        vae_steps=steps, raw_latent_mean=mean.tolist(), raw_latent_std=std.tolist(), raw_noise_std=noise.sqrt().tolist()
    )
    vae.fold_statistics(mean, std)
    save_weights(args.out / VAE_FILE, vae.state_dict(), torch.float16, ABOUT)
    vae.load_state_dict({k: v.half().float() for k, v in vae.state_dict().items()})

    test = scaled.simulate(held_out, frames=frames, height=height, width=width, seed=args.seed + 1).to(device)
    scores, rows, codes = [], [], []
    with torch.autocast(device.type, torch.bfloat16):
        for i in range(min(len(test), sizes["test_clips"])):
            clip = videos.render(
                test.select(torch.tensor([i], device=device)), frames=frames, height=height, width=width
            )
            code = vae.encode(clip)
            again = vae.decode(code).float()
            codes.append(normalise_latents(code.float()))
            scores.append(psnr(clip, again))
            if len(rows) < 6:
                rows += [clip[0].cpu(), again[0].cpu()]
    code = torch.cat(codes)
    smooth = (code[..., 1:] - code[..., :-1]).square().mean().item() / 2
    log.result(
        vae_test_psnr_db=sum(scores) / len(scores),
        vae_test_psnr_db_worst=min(scores),
        vae_test_clips=len(scores),
        normalised_latent_mean=code.mean((0, 2, 3, 4)).tolist(),
        normalised_latent_std=code.std((0, 2, 3, 4)).tolist(),
        neighbour_difference_variance=smooth,
    )
    images.write_png(args.out / "vae_sheet.png", images.contact_sheet(rows))
    log.write()
    return vae


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, log and picture")
    parser.add_argument("--minutes", type=float, default=3.2, help="training time, measuring not included")
    parser.add_argument("--steps", type=int, help="train this many steps instead of by the clock")
    parser.add_argument("--dim", type=int, default=16, help="base width")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--kl-weight", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--tiny", action="store_true", help="sizes for a trial of the code on a CPU, not for quality")
    parser.add_argument("--print-seconds", type=float, default=5.0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    device, sizes = torch.device(args.device), TINY if args.tiny else REAL
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    header = options_of(args) | {
        "torch": torch.__version__,
        "sizes": sizes,
        "kernels": choose_kernels(device, args.compile),
    }
    header["device_name"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(header, flush=True)
    train_vae(args, sizes, Budget(args.minutes * 60, args.steps), Log(args.out / "vae_log.json", header), device)


if __name__ == "__main__":
    main()
