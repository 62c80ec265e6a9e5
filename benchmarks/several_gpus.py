"""Two measurements on several GPUs of one host, each beside the same work on one of them.

    python -m benchmarks.several_gpus --out several.json                 on all GPUs of the machine
    python -m benchmarks.several_gpus --device cpu --tiny --processes 2  two processes on a CPU: a test of the script

attention: SLA2 of one sequence whose tokens the GPUs share, by sequence_parallel_attention; time includes the exchanges.
stage 2: the miniature's LoRA training with weights split over the GPUs (FSDP), at equal batch: losses and tokens per second.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from sla2_kernels import sla2_attention
from sla2_kernels.sequence_parallel import sequence_parallel_attention

from . import results
from .inputs import Shape, find_shape, make_inputs
from .measure import environment, is_gpu
from .ours import weights_for

PARTS = ("attention", "stage2")
TINY = Shape("tiny", 4, (1, 1, 600))
SPARSITY = 0.97
WARMUP = 5  # calls, and training steps, that are not timed


def main(argv=None):
    args = parse(argv)
    if "RANK" in os.environ:
        work(args)
        return
    content = {"environment": environment(args.device), "processes": args.processes, "sparsity": SPARSITY}
    if "attention" in args.parts:
        content["attention"] = launch(args, "attention", args.processes)
        print(attention_table(content["attention"], args.processes), flush=True)
    if "stage2" in args.parts:
        content["stage2"] = {count: launch(args, "stage2", count) for count in (1, args.processes)}
        print(training_table(content["stage2"]), flush=True)
    if args.out:
        results.save(args.out, content)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=torch.cuda.device_count(), help="one per GPU; at least 2")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=PARTS, help="of: " + ", ".join(PARTS))
    parser.add_argument("--shape", default="14B-720p", help="of the attention call")
    parser.add_argument("--steps", type=int, default=30, help="of training")
    parser.add_argument("--batch", type=int, default=16, help="videos per step, over all GPUs")
    parser.add_argument("--micro-batch", type=int, default=8, help="videos at a time on one GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="small tensors and a random model")
    parser.add_argument("--out", type=Path, help="results file")
    parser.add_argument("--work", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--found", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.processes < 2:
        parser.error("this compares several GPUs with one: it needs at least two (--processes on a CPU).")
    if args.tiny:
        args.steps, args.batch, args.micro_batch = 2, 2, 1
    return args


def launch(args, what, processes):
    """What rank 0 of ``processes`` processes found."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        options = ["--device", args.device, "--shape", args.shape, "--processes", str(args.processes)]
        options += ["--steps", str(args.steps), "--batch", str(args.batch), "--micro-batch", str(args.micro_batch)]
        options += ["--work", what, "--found", str(found), *(["--tiny"] if args.tiny else [])]
        variables = {**os.environ, "ACCELERATE_USE_CPU": str(not is_gpu(args.device)).lower()}
        subprocess.run([*start, "-m", "benchmarks.several_gpus", *options], env=variables, check=True)  # noqa: S603  itself
        return json.loads(found.read_text(encoding="utf-8"))


def work(args):
    """One process of many."""
    rank = int(os.environ["LOCAL_RANK"])
    device = torch.device(args.device, rank) if is_gpu(args.device) else torch.device(args.device)
    if is_gpu(device):
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if is_gpu(device) else "gloo")
    found = (attention if args.work == "attention" else stage2)(args, device)
    if rank == 0:
        args.found.write_text(json.dumps(found), encoding="utf-8")
    # gloo's threads of one process may still serve another
    dist.barrier()
    dist.destroy_process_group()


def attention(args, device):
    """{precision: {ms_alone, ms_together, ms_exchange, error, equal}}; medians over calls of the slowest process."""
    shape = TINY if args.tiny else find_shape(args.shape)
    qkv = make_inputs(shape, device=device)
    weights = weights_for("learned", shape.heads, shape.head_dim, device)
    processes, rank = dist.get_world_size(), dist.get_rank()
    mine = [x.chunk(processes, dim=1)[rank].contiguous() for x in qkv]
    found = {}
    for precision in ("int8", "16bit"):

        def attend(q, k, v, heads, precision=precision):
            own = weights.heads(heads)
            return sla2_attention(
                q, k, v, own.proj_q, own.proj_k, own.alpha, sparsity=SPARSITY, precision=precision, layout="BNHD"
            )

        def alone(attend=attend):
            return attend(*qkv, slice(None))

        def together(attend=attend):
            return sequence_parallel_attention(*mine, attend)

        expected, out = alone().chunk(processes, dim=1)[rank].float(), together().float()
        error = ((out - expected).norm() / expected.norm()).reshape(1)
        dist.all_reduce(error, dist.ReduceOp.MAX)
        found[precision] = {
            "ms_alone": slowest_ms(alone, device),
            "ms_together": slowest_ms(together, device),
            "ms_exchange": slowest_ms(lambda: sequence_parallel_attention(*mine, lambda q, k, v, heads: q), device),
            "error": error.item(),
        }
    return found


def slowest_ms(function, device, calls=20):
    """Median over calls of the time until the last process is done."""
    times = []
    for call in range(WARMUP + (calls if is_gpu(device) else 1)):
        dist.barrier()
        if is_gpu(device):
            torch.cuda.synchronize()
        begin = time.perf_counter()
        function()
        if is_gpu(device):
            torch.cuda.synchronize()
        taken = torch.tensor([1000 * (time.perf_counter() - begin)], device=device)
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        if call >= WARMUP:
            times.append(taken.item())
    return statistics.median(times)


def stage2(args, device):
    """{losses, tokens_per_second} of training the miniature, its weights split where there are several processes."""
    from sla2_kernels import identity_router
    from sla2_training.stage2 import Stage2Config, Stage2Trainer, Student, add_lora

    from .miniature_model import Miniature
    from .stage2_miniature import NAME, run, tokens, videos

    miniature = Miniature.tiny(device) if args.tiny else Miniature.load(None, device)
    length = {"steps": args.steps + WARMUP, "batch": args.batch, "micro_batch": args.micro_batch}
    never = {"gradient_checkpointing": False, "validate_every": 10**9, "checkpoint_every": 10**9}
    config = Stage2Config(
        output=str(args.found.parent),
        sparsity=SPARSITY,
        precision="16bit",
        lora_rank=32,
        lora_alpha=32,
        fsdp=True,
        mixed_precision="bf16" if is_gpu(device) else "no",
        **length,
        **never,
    )
    torch.manual_seed(0)
    add_lora(miniature.model.requires_grad_(False), config.lora_rank, config.lora_alpha, config.lora_targets)
    sizes = miniature.model.config
    router = identity_router("wan", sizes.num_layers, sizes.num_heads, 128)
    student = Student(miniature.model, run, router, sparsity=SPARSITY, precision=config.precision)
    times = []
    trainer = Stage2Trainer(config, student, videos(miniature, args.batch, 0), model_name=NAME, say=print)
    update = trainer._update

    def timed_update():
        update()
        if is_gpu(device):
            torch.cuda.synchronize()
        times.append(time.perf_counter())

    trainer._update = timed_update
    report = trainer.train()
    seconds = statistics.median(b - a for a, b in zip(times[WARMUP - 1 :], times[WARMUP:], strict=False))
    return {
        "losses": report.losses,
        "seconds_per_step": seconds,
        "tokens_per_second": args.batch * tokens(miniature) / seconds,
        "bytes": torch.cuda.max_memory_allocated() if is_gpu(device) else None,
    }


def attention_table(found, processes):
    lines = [
        f"| bits | one GPU ms | {processes} GPUs ms | of it exchanges ms | speed-up | error against one GPU |",
        "|---" * 6 + "|",
    ]
    for precision, row in found.items():
        speed_up = row["ms_alone"] / row["ms_together"]
        lines.append(
            f"| {precision} | {row['ms_alone']:.2f} | {row['ms_together']:.2f} | {row['ms_exchange']:.2f} | "
            f"{speed_up:.2f}x | {row['error']:.1e} |"
        )
    return "\n".join(lines)


def training_table(runs):
    first = next(iter(runs.values()))
    lines = ["| GPUs | s per step | tokens per second | peak GB each | largest loss difference |", "|---" * 5 + "|"]
    for count, row in runs.items():
        apart = max(abs(row["losses"][step] - loss) / loss for step, loss in first["losses"].items())
        memory = "-" if row["bytes"] is None else f"{row['bytes'] / 1e9:.1f}"
        rate = row["tokens_per_second"]
        lines.append(f"| {count} | {row['seconds_per_step']:.3f} | {rate:,.0f} | {memory} | {apart:.1e} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
