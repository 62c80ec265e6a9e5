"""Train the miniature: `python -m miniature.train vae|dit|all --out FOLDER --minutes M`.

Writes wan_miniature_vae.safetensors and wan_miniature_dit.safetensors, vae_log.json and dit_log.json (losses, sizes,
validation), and contact sheets. Training stops by the clock with the learning rate at zero; weights are saved every
minute, so a run that is cut off still leaves some. With --steps instead of the clock a run repeats step for step.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from .optim import Budget, Log
from .train_dit import train_dit
from .train_vae import VAE_FILE, choose_kernels, train_vae
from .vae import WanVAE

# (frames, height, width); a batch entry is (frames, side, clips).
REAL = {
    "world": (81, 320, 320), "vae_scenes": 4096, "vae_batches": [(17, 128, 16), (17, 128, 16), (9, 208, 12)],
    "statistics_clips": 48, "test_clips": 24, "small": (49, 192, 192), "full": (81, 320, 320),
    "small_batch": 48, "full_batch": 8, "sample_steps": 40,
}  # fmt: skip
TINY = {
    "world": (9, 64, 64), "vae_scenes": 16, "vae_batches": [(5, 32, 2), (9, 32, 1)],
    "statistics_clips": 2, "test_clips": 2, "small": (5, 64, 64), "full": (9, 64, 64),
    "small_batch": 3, "full_batch": 2, "sample_steps": 2,
}  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("vae", "dit", "all"))
    parser.add_argument("--out", required=True, help="folder for weights, logs and pictures")
    parser.add_argument("--minutes", type=float, default=8.0, help="training time of this call, measuring not included")
    parser.add_argument("--vae-share", type=float, default=0.4, help="of the minutes, for stage all")
    parser.add_argument("--steps", type=int, help="train each stage this many steps instead of by the clock")
    parser.add_argument("--vae", type=Path, help="VAE file for stage dit; default: the one in --out")
    parser.add_argument("--dit-start", type=Path, help="transformer file to continue from, instead of random weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--tiny", action="store_true", help="sizes for a trial of the code on a CPU, not for quality")
    parser.add_argument("--print-seconds", type=float, default=5.0)
    parser.add_argument("--vae-dim", type=int, default=16, help="base width of the VAE")
    parser.add_argument("--vae-lr", type=float, default=4e-3)
    parser.add_argument("--kl-weight", type=float, default=2e-4)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--ffn-dim", type=int, default=768)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--muon-lr", type=float, default=4e-3)
    parser.add_argument("--adam-lr", type=float, default=1.5e-3)
    parser.add_argument(
        "--small-share", type=float, default=0.4, help="share of the budget that trains on small clips only"
    )
    parser.add_argument(
        "--encode-share", type=float, default=0.2, help="most of the budget that encoding clips may take"
    )
    parser.add_argument("--small-clips", type=int, default=6000)
    parser.add_argument("--full-clips", type=int, default=2000)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    start = time.monotonic()
    args = parse(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    sizes = TINY if args.tiny else REAL
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    header = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "out"}
    header |= {"torch": torch.__version__, "sizes": sizes}
    header["device_name"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    header["kernels"] = choose_kernels(device, args.compile)
    print(header, flush=True)

    seconds = args.minutes * 60
    if args.stage in ("vae", "all"):
        share = args.vae_share if args.stage == "all" else 1.0
        budget = Budget(seconds * share, args.steps, start)
        vae = train_vae(args, sizes, budget, Log(out / "vae_log.json", header), device)
    else:
        from safetensors.torch import load_file

        path = args.vae or out / VAE_FILE
        if not path.exists():
            raise SystemExit(f"no VAE at {path}: train it first (stage vae) or name its file with --vae")
        vae = WanVAE.from_state_dict(load_file(path)).to(device)
    if args.stage in ("dit", "all"):
        # Encoding belongs to this budget, so its clock starts before the clips are made.
        budget = Budget(seconds, args.steps, start)
        train_dit(args, sizes, budget, vae, Log(out / "dit_log.json", header), device)


if __name__ == "__main__":
    main()
