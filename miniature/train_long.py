"""Train the miniature on to real length, in sittings: up to 81 frames of 832 x 480, 32,760 tokens.

    python -m miniature.train_long --out one --minutes 6 --layers 9 --decoder-seconds 50 --mix small=3,square=1 low=1,short=1 full=1
    python -m miniature.train_long --out two --from one --minutes 7 --mix small=1,full=5 --finish
    torchrun --nproc-per-node 2 -m miniature.train_long ...                         the same batches, shared by two GPUs
    python -m miniature.train_long --out tiny --tiny --steps 4 --minutes 0          a trial on a CPU, in seconds

A sitting renders and encodes clips, trains until its minutes are over, and saves: live.safetensors (where the next sitting
continues), the averaged weights and the VAE under their usual names, long_log.json. It begins with weights made by an earlier
one (--from) or with those that are shipped, grown to --layers. The optimiser's state is not kept: its memory is some 50
steps long, and each sitting warms up for 100. Several mixes share the sitting's time equally, one after the other. Seeds of
clips and noise follow from --seed and the sitting's number, so that no sitting sees the clips of another. --sparse-share 0.7
trains full clips with SLA2's own sparse attention, forward and backward, for the first 0.7 of a sitting: at 32,760 tokens a
step takes 0.6 of the time. --finish lowers the learning rate to zero over the second half of a sitting. --low-noise of the
steps see the levels at which outlines are drawn. Every process of torchrun encodes clips of its own (--clips 0.5 for as many in all).

Sizes: small, 81 frames of 208 x 128; square, 45 frames of 160 x 160; low, 81 frames of 416 x 256; short, 17 frames
of 832 x 480; full, 81 frames of it. All show the same world (scaled.py): layout, number and motion are learned small.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from sla2_kernels import sla2_attention

from .captions import embed, split_captions
from .grow import grow
from .optim import Average, Budget, Log, Optimiser, options_of, save_weights
from .pool import Pool, fill_pool
from .processes import Processes
from .sample import WEIGHTS
from .train_dit import ABOUT, DIT_FILE, EMPTY, flow_loss, is_block_matrix, noise_levels, validation_loss
from .train_vae import ABOUT as VAE_ABOUT
from .train_vae import VAE_FILE, compiled_norm
from .tune_decoder import tune_decoder
from .vae import Kernels, WanVAE
from .wan import Attention, WanBlock, WanConfig, WanModel, dense_attention
from .weight_files import weight_file

LIVE_FILE, LOG_FILE = "live.safetensors", "long_log.json"
TESTED = ("small", "full")  # sizes of the validation losses
SPARSITY = 0.9  # of --sparse-share
LOW_SHIFT = 2.0  # of the noise in --low-noise of the steps
ATTENTION = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


@dataclass(frozen=True)
class Size:
    """Clips of one size: extent in frames and pixels, how many are encoded and trained on at once, shift of the noise."""

    frames: int
    height: int
    width: int
    clips: int
    batch: int
    shift: float

    @property
    def extent(self) -> tuple[int, int, int]:
        return self.frames, self.height, self.width


# Token counts are multiples of 8: others make the compiler begin anew. The more tokens an object has, the higher the noise at
# which its place is decided: shifts grow with the picture's side.
REAL = {
    "small": Size(81, 128, 208, 3072, 64, 8.0),
    "square": Size(45, 160, 160, 384, 64, 8.0),
    "low": Size(81, 256, 416, 320, 8, 14.0),
    "short": Size(17, 480, 832, 256, 8, 14.0),
    "full": Size(81, 480, 832, 288, 2, 26.0),
}
TINY = {
    "small": Size(9, 16, 32, 4, 3, 5.0),
    "square": Size(5, 32, 32, 4, 3, 5.0),
    "low": Size(9, 16, 32, 3, 2, 5.0),
    "short": Size(5, 32, 48, 3, 2, 5.0),
    "full": Size(9, 32, 48, 2, 2, 8.0),
}
# (size, clips, latent frames, side of the window in latents or None) of the decoder's batches
DECODER = {False: [("full", 4, 21, 12), ("small", 2, 21, None), ("low", 4, 21, 12), ("square", 3, 12, None), ("full", 1, 3, None),
                   ("small", 2, 21, None), ("low", 2, 5, None)],
           True: [("full", 2, 3, 2), ("low", 1, 2, None)]}  # fmt: skip


def sparse_attention(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """SLA2 without a trained router on (B, N, H, D) views, differentiable; the layer number is ignored."""
    return sla2_attention(q, k, v, sparsity=SPARSITY, precision="16bit", layout="BNHD", keep_diagonal=True)


sparse_attention.ignores_layer = True


def parse_mix(text: str) -> dict[str, float]:
    """ "image=2,full=1" -> share of the steps by size, which add up to 1.

    Raises:
        ValueError: not such a text, or a size that is not known.
    """
    shares = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        try:
            shares[name] = float(number)
        except ValueError:
            raise ValueError(f"mix {text!r}: {part!r} is not SIZE=NUMBER") from None
        if name not in REAL or shares[name] < 0:
            raise ValueError(f"mix {text!r}: {part!r}: sizes are {', '.join(REAL)}, numbers are not negative")
    total = sum(shares.values())
    if not total:
        raise ValueError(f"mix {text!r} has no number above 0")
    return {name: share / total for name, share in shares.items() if share}


def check_mixes(parser: argparse.ArgumentParser, texts: list[str]) -> None:
    """Ends the program with the parser's usage where one of --mix is no such text."""
    try:
        [parse_mix(text) for text in texts]
    except ValueError as error:
        parser.error(str(error))


def draw_name(mix: dict[str, float], generator: torch.Generator) -> str:
    """A size, by the shares of the mix."""
    point = float(torch.rand((), generator=generator))
    for name, share in mix.items():
        point -= share
        if point < 0:
            return name
    return name


class Data:
    """Pools by size, held-out pools for the validation loss, and the context of every caption (the last is the empty one)."""

    def __init__(
        self, vae, sizes: dict[str, Size], names, *, share: float, seed: int, test_clips: int, log: Log, device
    ):
        train, held_out = split_captions()
        captions = train + held_out
        self.contexts = torch.cat([embed(str(caption)) for caption in [*captions, ""]]).to(device)
        generator = torch.Generator().manual_seed(seed)
        self.pools: dict[str, Pool] = {}
        for number, name in enumerate(names):
            order = torch.randperm(len(train), generator=generator).tolist()
            chosen = [order[i % len(order)] for i in range(math.ceil(sizes[name].clips * share))]
            begin = time.monotonic()
            self.pools[name] = fill_pool(
                vae, captions, chosen, size=sizes[name].extent, seed=seed + number, device=device
            )
            seconds = time.monotonic() - begin
            log.record(
                stage="encode", size=name, clips=len(chosen), seconds=seconds, clips_per_second=len(chosen) / seconds
            )
        held = [len(train) + i * len(held_out) // test_clips for i in range(test_clips)]
        self.test = {
            name: fill_pool(vae, captions, held, size=sizes[name].extent, seed=11, device=device) for name in TESTED
        }  # the same clips in every sitting


def load_start(folder: Path, layers: int | None) -> tuple[dict[str, torch.Tensor], int]:
    """(weights to begin with, number of the sitting): those of an earlier sitting, or the shipped ones, whose log is beside them.

    Raises:
        FileNotFoundError: the folder has no sitting.
    """
    if not (folder / LOG_FILE).exists():
        raise FileNotFoundError(f"no {LOG_FILE} in {folder}: name the --out folder of an earlier sitting")
    number = json.loads((folder / LOG_FILE).read_text())["run"]["sitting"] + 1
    # a sitting that finished at a learning rate of zero may be kept as its averaged weights alone
    live = folder / LIVE_FILE
    state = {
        key: value.float() for key, value in load_file(live if live.exists() else weight_file(DIT_FILE, folder)).items()
    }
    return (grow(state, layers) if layers else state), number


def train(model, data: Data, sizes, mixes, args, *, budget: Budget, seed: int, log: Log, save, processes) -> Average:
    """Flow matching on the mixes in turn until the budget is used up; the model has the live weights, the result the averaged ones."""
    device = processes.device
    # The plan, equal in all processes, draws each step's size and range of noise; the generator what is in a batch.
    plan = torch.Generator().manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1 + processes.rank)
    # Without --finish the learning rate stays up: the next sitting goes on from there.
    hold = 0.5 if args.finish else 1 - 1e-6
    optimiser = Optimiser(model, is_block_matrix, muon_lr=args.muon_lr, adam_lr=args.adam_lr, hold=hold)
    average = Average(model, 0.996)
    step, seen, printed, saved = 0, {}, time.monotonic(), time.monotonic()
    while (progress := processes.agree(budget.progress(step))) < 1:
        name = draw_name(mixes[min(int(progress * len(mixes)), len(mixes) - 1)], plan)
        size, pool = sizes[name], data.pools[name]
        batch = processes.share(size.batch)
        index = torch.randint(len(pool), (batch,), generator=generator).to(device)
        dropped = (torch.rand(batch, generator=generator) < 0.1).to(device)
        context = data.contexts[torch.where(dropped, EMPTY, pool.caption[index])]
        clean = pool.latents[index].float()
        low = float(torch.rand((), generator=plan)) < args.low_noise
        t = noise_levels(batch, LOW_SHIFT if low else size.shift, generator).to(device)
        sparse = name == "full" and progress < args.sparse_share
        attention = sparse_attention if sparse else dense_attention
        attending = partial(model, attention=attention)
        loss = flow_loss(attending, clean, torch.randn_like(clean), t, context).mean()
        loss.backward()
        processes.average_gradients(model)
        factor = optimiser.step(progress)
        average.update()
        step += 1
        seen.setdefault(name, []).append(loss.detach())
        now = time.monotonic()
        if now - printed > args.print_seconds or budget.progress(step) >= 1:
            means = {f"loss_{key}": torch.stack(losses).mean().item() for key, losses in seen.items()}
            counts = {f"steps_{key}": len(losses) for key, losses in seen.items()}
            log.record(stage="train", seconds=budget.elapsed(), step=step, lr=factor, **means, **counts)
            if not all(map(math.isfinite, means.values())):
                raise FloatingPointError(f"training diverged at step {step}: lower --muon-lr and --adam-lr")
            printed, seen = now, {}
        if now - saved > args.save_seconds:
            save(average)
            saved = time.monotonic()
    log.result(steps=step)
    return average


def prepare(args, device) -> None:
    """Process-wide settings of a sitting."""
    torch.backends.cudnn.benchmark = False  # sizes change from step to step
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if args.compile:
        Kernels.norm = compiled_norm()


def attention_backend(name: str, device):
    """Context in which torch's attention runs by this backend, where it can; "any" leaves torch the choice."""
    if name == "any" or device.type != "cuda":
        return contextlib.nullcontext()
    return sdpa_kernel([ATTENTION[name], SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True)


def build(state: dict[str, torch.Tensor], compile_: bool, device) -> WanModel:
    """The transformer of a state dict, its blocks compiled once for all lengths if asked for."""
    model = WanModel(WanConfig.from_state_dict(state))
    model.load_state_dict(state)
    if compile_:
        model.run_block = torch.compile(WanBlock.forward, dynamic=True)
    return model.to(device)


def gradient_error(model: WanModel, state, size: Size, device, attention: Attention = dense_attention) -> float:
    """Relative difference between the gradients of the compiled model and those of the plain one, on one random batch.

    Raises:
        ArithmeticError: above 10%, where rounding to bfloat16 explains 2%.
    """
    torch.manual_seed(0)
    shape = (size.batch, 16, (size.frames + 3) // 4, size.height // 8, size.width // 8)
    clean, noise = torch.randn(2, *shape, device=device)
    t = torch.linspace(0.2, 0.95, size.batch, device=device)
    context = embed("two red balls").to(device).expand(size.batch, -1, -1)
    plain = build(state, False, device).train()
    gradients = []
    for one, backend in ((model, contextlib.nullcontext()), (plain, attention_backend("flash", device))):
        with backend:
            flow_loss(partial(one, attention=attention), clean, noise, t, context).mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in one.parameters()]))
        one.zero_grad(set_to_none=True)
    error = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
    if not error < 0.1:
        raise ArithmeticError(f"gradients of the compiled blocks are off by {error:.0%}: try another --attention")
    return error


def validate(judge: WanModel, data: Data, log: Log, when: str = "") -> None:
    """Log the loss on the held-out clips of every tested size as validation_loss_SIZE + when."""
    for name, pool in data.test.items():
        loss = validation_loss(judge, pool, data.contexts)
        log.result(**{f"validation_loss_{name}{when}": loss})


def sit(args) -> None:
    """One sitting, from preparation to saved files."""
    start = time.monotonic()
    processes = Processes(torch.device(args.device))
    device, sizes = processes.device, TINY if args.tiny else REAL
    prepare(args, device)
    state, number = load_start(args.start, args.layers)
    seed = args.seed + 1000 * number
    torch.manual_seed(seed + 100 * processes.rank)
    header = options_of(args) | {"sitting": number, "processes": processes.count, "torch": torch.__version__}
    header["device_name"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    log = Log(args.out / LOG_FILE, header)
    print(header, flush=True)

    vae = WanVAE.from_state_dict(load_file(weight_file(VAE_FILE, args.start))).to(device).eval().requires_grad_(False)
    model = build(state, args.compile, device).train()
    mixes = [parse_mix(text) for text in args.mix]
    names = list(dict.fromkeys(name for mix in mixes for name in mix))
    with attention_backend(args.attention, device):
        if args.compile:
            name = "full" if "full" in names else names[0]
            for attention in (dense_attention, sparse_attention)[: 1 + bool(args.sparse_share)]:
                error = gradient_error(model, state, sizes[name], device, attention)
                log.record(stage="check", size=name, attention=attention.__name__, gradient_error=error)
    if args.decoder_seconds:
        names = list(dict.fromkeys([*names, *(name for name, *_ in DECODER[args.tiny])]))
    data = Data(
        vae,
        sizes,
        names,
        share=args.clips,
        seed=seed + 100 * processes.rank,
        test_clips=args.test_clips,
        log=log,
        device=device,
    )
    if args.decoder_seconds:
        batches = [(data.pools[name], *rest) for name, *rest in DECODER[args.tiny]]
        budget = Budget(args.decoder_seconds, args.steps)
        steps = tune_decoder(vae, batches, budget=budget, lr=args.decoder_lr, log=log,
                             generator=torch.Generator().manual_seed(seed), print_seconds=args.print_seconds,
                             share=args.decoder_share)  # fmt: skip
        log.result(decoder_steps=steps)
    if processes.first:
        save_weights(args.out / VAE_FILE, vae.state_dict(), torch.float16, VAE_ABOUT)

    def save(average: Average) -> None:
        if not processes.first:
            return
        save_weights(args.out / DIT_FILE, average.state_dict(), torch.bfloat16, ABOUT)
        save_weights(args.out / LIVE_FILE, model.state_dict(), torch.bfloat16, "live weights of a sitting")
        log.write()

    budget = Budget(args.minutes * 60, args.steps, start)
    budget.restart()
    judge = build(state, False, device).eval()
    validate(judge, data, log, "_before")
    with attention_backend(args.attention, device):
        average = train(
            model, data, sizes, mixes, args, budget=budget, seed=seed, log=log, save=save, processes=processes
        )
        save(average)
    judge.load_state_dict({k: v.bfloat16().float() for k, v in average.state_dict().items()})
    validate(judge, data, log)
    if device.type == "cuda":
        log.result(peak_memory_gib=torch.cuda.max_memory_allocated(device) / 2**30)
    log.result(seconds=time.monotonic() - start)
    if processes.first:
        log.write()
    processes.close()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for this sitting's files")
    parser.add_argument(
        "--from",
        dest="start",
        type=Path,
        default=WEIGHTS,
        help="--out folder of the sitting before; default: shipped weights",
    )
    parser.add_argument("--minutes", type=float, required=True, help="of this sitting, from its start to the last step")
    parser.add_argument("--steps", type=int, help="train this many steps instead of by the clock")
    parser.add_argument("--layers", type=int, help="grow the transformer to this many blocks first")
    parser.add_argument("--mix", nargs="+", default=["small=1", "low=1,full=1"], help="shares of the steps by size")
    parser.add_argument("--finish", action="store_true", help="lower the learning rate to zero in this sitting")
    parser.add_argument(
        "--clips", type=float, default=1.0, help="share of the clips of every size: less in a short sitting"
    )
    parser.add_argument(
        "--low-noise",
        type=float,
        default=0.3,
        help="share of the steps with noise levels of shift 2 (median 0.67), whatever the size",
    )
    parser.add_argument("--decoder-seconds", type=float, default=0.0, help="train the VAE's decoder this long first")
    parser.add_argument("--decoder-share", type=float, default=1.0, help="how far its weights move to the trained ones")
    parser.add_argument("--decoder-lr", type=float, default=1e-3)
    parser.add_argument("--muon-lr", type=float, default=3e-3)
    parser.add_argument("--adam-lr", type=float, default=1e-3)
    parser.add_argument("--attention", choices=("any", *ATTENTION), default="any", help="torch's attention backend")
    parser.add_argument(
        "--sparse-share", type=float, default=0.0, help="of a sitting: full clips train with sparse attention"
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--test-clips", type=int, default=6, help="held-out clips of the validation losses")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="sizes for a trial of the code on a CPU, not for quality")
    parser.add_argument("--print-seconds", type=float, default=5.0)
    parser.add_argument("--save-seconds", type=float, default=60.0, help="files are also written this often")
    args = parser.parse_args(argv)
    check_mixes(parser, args.mix)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    sit(args)


if __name__ == "__main__":
    main()
