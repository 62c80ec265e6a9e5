"""The part "stage2" of several_gpus.py: LoRA training with weights split over the GPUs (FSDP2), at equal batch.

The miniature, or with --model 14B a Wan transformer of 14B's sizes with random weights at 480p (32,760 tokens), --layers of
it: its float32 weights are 1.4 GB a layer on one GPU, and a share of that on several. The optimiser's state is the LoRA's,
10 GB at most: it fits every card, and the weights decide how many GPUs a model needs.
"""

import statistics
import tempfile
import time
from contextlib import contextmanager

import torch
import torch.distributed as dist

from sla2_kernels import identity_router
from sla2_training.stage2 import Stage2Config, Stage2Trainer, Student, VideoLatents, add_lora
from sla2_training.stage2.wan import wan_student

from .measure import is_gpu
from .together import SPARSITY, largest

LATENTS = (16, 21, 60, 104)  # 32,760 tokens
TINY_LATENTS = (16, 3, 12, 16)  # 144
WARMUP = 2  # steps that are not timed


def stage2(args, device):
    """{losses, seconds_per_step, tokens_per_second, bytes} of training, weights split where there are several processes."""
    processes = dist.get_world_size()
    most = 1 if args.model == "14B" else 4  # of the miniature, at 15 GiB a video
    micro_batch = args.micro_batch or max(1, min(most, args.batch // processes))
    config = Stage2Config(
        output=tempfile.mkdtemp(dir=args.folder),
        sparsity=SPARSITY,
        precision="16bit",
        lora_rank=32,
        lora_alpha=32,
        fsdp=True,
        mixed_precision="bf16" if is_gpu(device) else "no",
        steps=args.steps + WARMUP,
        batch=args.batch,
        micro_batch=micro_batch,
        gradient_checkpointing=args.model == "14B",
        validate_every=10**9,
        checkpoint_every=10**9,
    )
    if is_gpu(device):
        torch.cuda.reset_peak_memory_stats()
    trainer, tokens = (wan if args.model == "14B" else miniature)(args, config, device)
    losses, seconds = train(trainer, device)
    return {
        "losses": losses,
        "seconds_per_step": seconds,
        "tokens_per_second": args.batch * tokens / seconds,
        "bytes": largest(torch.cuda.max_memory_allocated(), device) if is_gpu(device) else None,
    }


def train(trainer, device, warmup=WARMUP):
    """(losses, median seconds of a step) of the whole training; ``warmup`` steps are not timed, one at least."""
    times = []
    update = trainer._update

    def timed_update():
        update()
        if is_gpu(device):
            torch.cuda.synchronize()
        times.append(time.perf_counter())

    trainer._update = timed_update
    return trainer.train().losses, median_step(times, warmup)


def median_step(times, warmup):
    """Median seconds between ``times``, at which steps ended; ``warmup`` steps are not timed, one at least."""
    return statistics.median(b - a for a, b in zip(times[warmup - 1 :], times[warmup:], strict=False))


def miniature(args, config, device):
    """(trainer, tokens of a video)."""
    from .miniature_model import Miniature
    from .stage2_miniature import NAME, run, tokens, videos

    made = Miniature.tiny(device) if args.tiny else Miniature.load(None, device)
    torch.manual_seed(0)
    add_lora(made.model.requires_grad_(False), config.lora_rank, config.lora_alpha, config.lora_targets)
    sizes = made.model.config
    router = identity_router("wan", sizes.num_layers, sizes.num_heads, 128)
    student = Student(made.model, run, router, sparsity=config.sparsity, precision=config.precision)
    return Stage2Trainer(config, student, videos(made, args.batch, 0), model_name=NAME, say=print), tokens(made)


def wan(args, config, device, **sizes):
    """(trainer, tokens of a video); the model is the same in every process. sizes: where they are not Wan 14B's.

    Blocks are made on ``device``, which is faster, and wait on the CPU where they will be split: no GPU holds all of them.
    """
    from .several_gpus_step import transformer

    with blocks_wait_on("cpu" if config.fsdp else device):
        model = transformer(args.layers, device, args.tiny, torch.float32, **sizes)
    generator = torch.Generator().manual_seed(1)
    shape = TINY_LATENTS if args.tiny else LATENTS
    latents = torch.randn(args.batch, *shape, generator=generator)
    context = torch.randn(args.batch, 32 if args.tiny else 512, model.config.text_dim, generator=generator)
    data = VideoLatents(latents, context, torch.arange(args.batch))
    trainer = Stage2Trainer(config, wan_student(model, config), data, model_name="random Wan", say=print)
    return trainer, shape[1] * shape[2] * shape[3] // 4


@contextmanager
def blocks_wait_on(device):
    """Within it, each block of diffusers' Wan transformer goes to ``device`` as soon as it is made."""
    from diffusers.models.transformers import transformer_wan

    made = transformer_wan.WanTransformerBlock
    transformer_wan.WanTransformerBlock = lambda *sizes: made(*sizes).to(device)
    try:
        yield
    finally:
        transformer_wan.WanTransformerBlock = made


def training_table(runs):
    first = next(iter(runs.values()))
    lines = ["| GPUs | s per step | tokens per second | peak GB each | largest loss difference |", "|---" * 5 + "|"]
    for count, row in runs.items():
        apart = max(abs(row["losses"][step] - loss) / loss for step, loss in first["losses"].items())
        memory = "-" if row["bytes"] is None else f"{row['bytes'] / 1e9:.1f}"
        rate = row["tokens_per_second"]
        lines.append(f"| {count} | {row['seconds_per_step']:.3f} | {rate:,.0f} | {memory} | {apart:.1e} |")
    return "\n".join(lines)
