"""Training of the miniature's transformer on latents of rendered clips, by flow matching."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from . import images
from .captions import Caption, embed, split_captions
from .clips import encode_scenes, simulate_clips
from .optim import Average, Budget, Log, Optimiser, save_weights
from .sample import sample_latents
from .vae import WanVAE, denormalise_latents
from .wan import WanBlock, WanConfig, WanModel

ABOUT = "Wan2.1-shaped text-to-video transformer, trained on procedural videos (miniature/README.md)"
DIT_FILE = "wan_miniature_dit.safetensors"
EMPTY = -1
MATRICES = {"q.weight", "k.weight", "v.weight", "o.weight", "ffn.0.weight", "ffn.2.weight"}


def is_block_matrix(name: str, p: torch.Tensor) -> bool:
    """Whether Muon trains this parameter: the matrices of the blocks."""
    return name.startswith("blocks") and name.split(".", 2)[2].split("attn.")[-1] in MATRICES


@dataclass(frozen=True)
class LatentSet:
    """Encoded clips of one size: normalised latents (N, 16, T, h, w) in bfloat16 and the caption number of each (N,)."""

    latents: torch.Tensor
    caption: torch.Tensor

    @property
    def tokens(self) -> int:
        return self.latents[0, 0].numel() // 4


@torch.no_grad()
def encode_clips(
    vae: WanVAE, captions: list[Caption], chosen: list[int], *, size, seed: int, batch: int, device, until: float
) -> LatentSet:
    """Render and encode one clip per chosen caption number; stops early (with at least a batch) when `until` passes."""
    scenes = simulate_clips(captions, chosen, size, seed, device)
    latents = encode_scenes(vae, scenes, size=size, batch=batch, until=until)
    return LatentSet(latents, torch.tensor(chosen[: len(latents)], device=device))


def noise_levels(batch: int, shift: float, generator: torch.Generator) -> torch.Tensor:
    """(batch,) levels in (0, 1), one from each equal part of the range, shifted towards noise as sampling is."""
    u = (torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)) / batch
    u = u.clamp(1e-4, 1 - 1e-4)
    return shift * u / (1 + (shift - 1) * u)


def flow_loss(model, clean, noise, t, context, rope_scale: float = 1.0) -> torch.Tensor:
    """(B,) mean squared error of the velocity noise - clean at noise level t."""
    level = t.view(-1, 1, 1, 1, 1)
    noisy = torch.lerp(clean, noise, level)
    with torch.autocast(clean.device.type, torch.bfloat16):
        velocity = model(noisy, t * 1000, context, rope_scale=rope_scale)
    return (velocity.float() - (noise - clean)).square().mean((1, 2, 3, 4))


def validation_loss(
    model, data: LatentSet, contexts: torch.Tensor, levels: int = 8, clips: int | None = None, rope_scale: float = 1.0
) -> float:
    """Mean of validation_losses()."""
    losses = validation_losses(model, data, contexts, levels, clips, rope_scale)
    return sum(losses) / len(losses)


@torch.no_grad()
def validation_losses(
    model, data: LatentSet, contexts: torch.Tensor, levels: int = 8, clips: int | None = None, rope_scale: float = 1.0
) -> list[float]:
    """Flow loss of each clip, the mean over evenly spaced noise levels, with noise that is the same at every call."""
    device, losses = data.latents.device, []
    for i in range(min(clips or len(data.latents), len(data.latents))):
        clean = data.latents[i : i + 1].float()
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1000 + i)).to(device)
        total = 0.0
        for level in range(levels):
            t = torch.full((1,), (level + 0.5) / levels, device=device)
            total += flow_loss(model, clean, noise, t, contexts[data.caption[i : i + 1]], rope_scale)
        losses.append((total / levels).item())
    return losses


def train_dit(args, sizes: dict, budget: Budget, vae: WanVAE, log: Log, device: torch.device) -> WanModel:
    """Encode the data, train, save, measure and sample; returns the model with the saved weights."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    vae = vae.to(device).eval()
    small, full, test, contexts, held_out = _data(args, sizes, budget, vae, log, device, generator)

    config = WanConfig(dim=args.dim, ffn_dim=args.ffn_dim, num_layers=args.layers)
    model = WanModel(config).to(device)
    with torch.no_grad():
        model.head.head.weight.zero_()
    if args.dit_start:
        model.load_state_dict(load_file(args.dit_start))
    if args.compile:
        model.run_block = torch.compile(WanBlock.forward, dynamic=False)
    optimiser = Optimiser(model, is_block_matrix, muon_lr=args.muon_lr, adam_lr=args.adam_lr, hold=0.5)
    average = Average(model, 0.999)
    judge = WanModel(config).to(device).eval()

    def judged() -> WanModel:
        judge.load_state_dict({k: v.to(torch.bfloat16).float() for k, v in average.state_dict().items()})
        return judge

    out = Path(args.out)
    saved = printed = time.monotonic()
    step, tokens, losses = 0, 0, {}
    model.train()
    budget.restart()
    while (progress := budget.progress(step)) < 1:
        # Small clips first (structure at a twelfth of the cost), then full ones; some small ones stay so that both work.
        use_small = progress < args.small_share or step % 6 == 0
        data, batch, shift = (small, sizes["small_batch"], 3.0) if use_small else (full, sizes["full_batch"], 5.0)
        index = torch.randint(len(data.latents), (batch,), generator=generator).to(device)
        caption = data.caption[index]
        dropped = torch.rand(batch, generator=generator) < 0.1
        caption = torch.where(dropped.to(device), EMPTY, caption)
        clean = data.latents[index].float()
        t = noise_levels(batch, shift, generator).to(device)
        loss = flow_loss(model, clean, torch.randn_like(clean), t, contexts[caption]).mean()
        loss.backward()
        factor = optimiser.step(progress)
        average.update()
        step += 1
        tokens += batch * data.tokens
        losses.setdefault("small" if use_small else "full", []).append(loss.detach())
        now = time.monotonic()
        if now - printed > args.print_seconds:
            means = {f"loss_{k}": torch.stack(v).mean().item() for k, v in losses.items()}
            speed = tokens / (now - printed)
            log.record(stage="dit", seconds=budget.elapsed(), step=step, lr=factor, tokens_per_second=speed, **means)
            if not all(map(math.isfinite, means.values())):
                raise FloatingPointError(f"training diverged at step {step}: lower --muon-lr and --adam-lr")
            printed, tokens, losses = now, 0, {}
        if now - saved > 60:
            save_weights(out / DIT_FILE, average.state_dict(), torch.bfloat16, ABOUT)
            loss_small = validation_loss(judged(), test["small"], contexts, clips=8)
            loss_full = validation_loss(judge, test["full"], contexts, clips=4)
            log.record(stage="validation", seconds=budget.elapsed(), step=step, small=loss_small, full=loss_full)
            log.write()
            saved = time.monotonic()

    save_weights(out / DIT_FILE, average.state_dict(), torch.bfloat16, ABOUT)
    model = judged()
    log.result(
        dit_steps=step,
        dit_parameters=sum(p.numel() for p in model.parameters()),
        evaluated_tokens=full.tokens,
        **{f"validation_loss_{k}": validation_loss(model, data, contexts) for k, data in test.items()},
    )
    log.write()
    if device.type == "cuda":
        log.result(peak_memory_gib=torch.cuda.max_memory_allocated(device) / 2**30)
    shown = _spread(held_out, 6)
    for name in ("full", "small"):
        noise_shape = (1, *test[name].latents.shape[1:])
        videos_ = []
        for i, caption in enumerate(shown if name == "full" else shown[:3]):
            with torch.autocast(device.type, torch.bfloat16):
                options = {"shape": noise_shape, "steps": sizes["sample_steps"], "device": device}
                latents = sample_latents(model, embed(str(caption)), seed=args.seed + i, **options)
                with torch.no_grad():
                    videos_.append(vae.decode(denormalise_latents(latents))[0].float().cpu())
        images.write_png(out / f"samples_{name}.png", images.contact_sheet(videos_, shrink=2 if name == "full" else 1))
    log.result(sampled=[str(caption) for caption in shown])
    log.write()
    return model


def _spread(items: list, count: int) -> list:
    """`count` items at even distances."""
    return [items[i * len(items) // count] for i in range(min(count, len(items)))]


def _data(args, sizes, budget, vae, log, device, generator):
    """Training sets of both sizes, test sets by name, the context of every caption (the last row is the empty one)."""
    train_captions, held_out = split_captions()
    captions = train_captions + held_out
    contexts = torch.cat([embed(str(caption)) for caption in [*captions, ""]]).to(device)
    held_numbers = list(range(len(train_captions), len(captions)))
    begin = time.monotonic()
    share = args.encode_share * budget.seconds if budget.steps is None else float("inf")

    def encode(chosen, name, seed, until, batch):
        return encode_clips(vae, captions, chosen, size=sizes[name], seed=seed, batch=batch, device=device, until=until)

    def pick(count):
        order = torch.randperm(len(train_captions), generator=generator).tolist()
        return [order[i % len(order)] for i in range(count)]

    never = float("inf")
    tests = sizes["test_clips"]
    test = {
        "small": encode(held_numbers[:tests], "small", args.seed + 11, never, 8),
        "full": encode(held_numbers[:tests], "full", args.seed + 12, never, 1),
        "full_seen_captions": encode(pick(tests), "full", args.seed + 13, never, 1),
    }
    small = encode(pick(args.small_clips), "small", args.seed + 14, begin + 0.4 * share, 8)
    full = encode(pick(args.full_clips), "full", args.seed + 15, begin + share, 1)
    log.result(small_clips=len(small.latents), small_size=sizes["small"], small_tokens=small.tokens)
    log.result(full_clips=len(full.latents), full_size=sizes["full"], full_tokens=full.tokens)
    log.result(encode_seconds=time.monotonic() - begin)
    return small, full, test, contexts, held_out
