"""How long the parts of a sitting of miniature.train_long take, size by size: python -m benchmarks.miniature_length --layers 9

One line per measurement: rendering and encoding a clip, a training step of the decoder, a training step of the transformer
by each attention backend. Planning a sitting's mix, and how many clips it can encode, needs these.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from miniature import scaled, videos
from miniature.captions import embed, split_captions
from miniature.optim import Budget, Log, Optimiser
from miniature.pool import fill_pool
from miniature.train_dit import flow_loss, is_block_matrix
from miniature.train_long import DECODER, REAL, TINY, attention_backend, build, load_start, prepare
from miniature.train_vae import VAE_FILE
from miniature.tune_decoder import tune_decoder
from miniature.vae import WanVAE
from miniature.weight_files import WEIGHTS, weight_file


def milliseconds(device, repeats: int, work) -> float:
    """Mean time of work() after one call to warm up."""
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.monotonic()
    for _ in range(repeats):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.monotonic() - begin) / repeats * 1e3


def data_speed(name: str, size, args, vae, device):
    """Prints the times of one size; a pool of a few clips for the other measurements."""
    train, _ = split_captions()
    frames, height, width = size.extent
    scenes = scaled.simulate(train[:2], frames=frames, height=height, width=width, seed=0).to(device)
    render = milliseconds(
        device, args.repeats, lambda: videos.render(scenes, frames=frames, height=height, width=width)
    )
    count = min(2 * max(1, 8_000_000 // (frames * height * width)), size.clips)
    chosen = [i % len(train) for i in range(count)]

    def fill():
        return fill_pool(vae, train, chosen, size=size.extent, seed=0, device=device)

    both = milliseconds(device, 1, fill)
    print(f"{name}: render {render / 2:.1f} ms a clip, render and encode {both / count:.1f} ms a clip", flush=True)
    return fill()


def decoder_speed(args, vae, pools, out: Path) -> None:
    for name, *rest in DECODER[args.tiny]:
        batches = [(pools[name], *rest)]
        for part, steps in (("warm", 2), ("timed", args.repeats)):
            begin = time.monotonic()
            tune_decoder(vae, batches, budget=Budget(0, steps), lr=1e-4, log=Log(out, {}),
                         generator=torch.Generator().manual_seed(0), print_seconds=1e9)  # fmt: skip
            if part == "timed":
                print(f"decoder {name} {rest}: {(time.monotonic() - begin) / steps * 1e3:.1f} ms a step", flush=True)


def step_speed(name: str, size, pool, model, backend: str, args, device) -> None:
    optimiser = Optimiser(model, is_block_matrix, muon_lr=1e-6, adam_lr=1e-6, hold=0.5)
    context = embed("two red balls bounce over tiles, camera still").to(device).expand(size.batch, -1, -1)
    latents = pool.latents[:1].float().expand(size.batch, -1, -1, -1, -1).contiguous()
    t = torch.full((size.batch,), 0.7, device=device)

    def step():
        flow_loss(model, latents, torch.randn_like(latents), t, context).mean().backward()
        optimiser.step(0.0)

    with attention_backend(backend, device):
        begin = time.monotonic()
        step()
        first = time.monotonic() - begin
        ms = milliseconds(device, args.repeats, step)
    rate = size.batch * pool.tokens / ms / 1e3
    print(
        f"{backend} {name}: {ms:.1f} ms a step of {size.batch} clips, {rate:.2f} million tokens/s, first {first:.1f} s"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="grow the transformer to this many blocks; default: as it is")
    parser.add_argument("--attention", nargs="+", default=["flash", "cudnn"], choices=("any", "flash", "cudnn"))
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, for a test of the script")
    parser.add_argument(
        "--log", type=Path, default=Path("length_log.json"), help="where the decoder's training logs go"
    )
    args = parser.parse_args(argv)
    device, sizes = torch.device(args.device), TINY if args.tiny else REAL
    prepare(args, device)
    vae = WanVAE.from_state_dict(load_file(weight_file(VAE_FILE, WEIGHTS))).to(device).eval().requires_grad_(False)
    pools = {name: data_speed(name, size, args, vae, device) for name, size in sizes.items()}
    state, _ = load_start(WEIGHTS, args.layers)
    for backend in args.attention:
        model = build(state, args.compile, device).train()
        for name, size in sizes.items():
            step_speed(name, size, pools[name], model, backend, args, device)
    decoder_speed(args, vae, pools, args.log)
    if device.type == "cuda":
        print(f"peak {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB, {torch.cuda.get_device_name(device)}")


if __name__ == "__main__":
    main()
