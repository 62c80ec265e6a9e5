"""Measurements on several GPUs of one host, each beside the same work on one of them, and on 2, 4, ... up to all.

    python -m benchmarks.several_gpus --processes 2 --out two.json       on two GPUs; 4 for four, which measures two as well
    python -m benchmarks.several_gpus --processes 2 --parts step         one part
    python -m benchmarks.several_gpus --processes 2 --parts timeline --groups 5   what the GPU does in one call
    python -m benchmarks.several_gpus --processes 1 --parts messages     what one GPU can measure
    python -m benchmarks.several_gpus --device cpu --tiny --processes 2  two processes on a CPU: a test of the script

attention: SLA2 of one sequence whose tokens the GPUs share, by sequence_parallel_attention; time includes the exchanges,
    by NCCL and by copies, every way in turn.
step: one call of diffusers' Wan transformer at 14B-720p, random weights, dense and with SLA2 (several_gpus_step.py).
stage2: LoRA training with weights split over the GPUs (FSDP2), at equal batch: losses and tokens per second.
timeline: kernels and copies of one INT8 call in --groups groups of heads, in order of start, from torch.profiler.
messages: packing and opening what 2 and 4 GPUs would exchange, on one GPU and without sending it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from . import lists, results
from .measure import environment, is_gpu
from .several_gpus_operator import attention, attention_table, messages, messages_table, timeline, timeline_table
from .together import SPARSITY

SEVERAL_GPUS = ("attention", "step", "stage2", "timeline")
PARTS = (*SEVERAL_GPUS, "messages")


def main(argv=None):
    args = parse(argv)
    if "RANK" in os.environ:
        work(args)
        return
    content = {"environment": environment(args.device), "processes": args.processes, "sparsity": SPARSITY}
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        for part in args.parts:
            content[part] = {}
            for count in args.counts or counts(args.processes, part):
                content[part][count] = messages(args, args.device) if part == "messages" else launch(args, part, count)
                # after each of them: a run may be cut
                if args.out:
                    results.save(args.out, content)
            print(table(part, content[part]), flush=True)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=torch.cuda.device_count(), help="one per GPU")
    parser.add_argument(
        "--counts",
        type=lists.whole_numbers,
        help="processes to measure with, instead of 1, 2, 4, ... and all",
    )
    parser.add_argument("--parts", type=lists.names, default=SEVERAL_GPUS[:3], help="of: " + ", ".join(PARTS))
    parser.add_argument("--shape", default="14B-720p", help="of the attention call and of the messages")
    parser.add_argument(
        "--layers", type=int, default=40, help="of the 14B model; of a step's fewer where they do not fit"
    )
    parser.add_argument("--calls", type=int, default=3, help="timed calls of the model")
    parser.add_argument("--transfer", choices=("nccl", "copies"), help="of a step and a timeline; else what ships does")
    parser.add_argument(
        "--groups", default="5", help="of heads in a timeline: how many, or their relative sizes, as 1:3:1"
    )
    parser.add_argument("--model", choices=("miniature", "14B"), default="miniature", help="that is trained")
    parser.add_argument("--steps", type=int, default=30, help="of training")
    parser.add_argument("--batch", type=int, default=16, help="videos per step, over all GPUs")
    parser.add_argument("--micro-batch", type=int, default=None, help="videos at a time on one GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="small tensors and random models")
    parser.add_argument("--out", type=Path, help="results file")
    parser.add_argument("--work", choices=SEVERAL_GPUS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    unknown = sorted(set(args.parts) - set(PARTS))
    if unknown:
        parser.error(f"--parts must be some of {', '.join(PARTS)}, got {unknown[0]!r}.")
    if not (args.work or args.counts) and args.processes < 2 and set(args.parts) != {"messages"}:
        parser.error("this compares several GPUs with one: it needs at least two (--processes on a CPU).")
    if args.tiny:
        args.steps, args.calls, args.layers = 2, 1, 2
        args.batch = min(args.batch, 4)
    return args


def counts(processes, part):
    """Numbers of processes that a part is measured with: 1, 2, 4, ... and all."""
    if part == "messages":
        return [1]
    doubled = [2**i for i in range(processes.bit_length()) if 2**i < processes]
    # one GPU's operator and step are timed in a run of several
    return [*(n for n in doubled if n > 1 or part == "stage2"), processes]


def launch(args, part, processes):
    """What rank 0 of ``processes`` processes found."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    options = ["--device", args.device, "--shape", args.shape, "--processes", str(args.processes)]
    options += ["--layers", str(args.layers), "--calls", str(args.calls), "--model", args.model]
    options += ["--steps", str(args.steps), "--batch", str(args.batch), "--groups", args.groups]
    options += ["--transfer", args.transfer] if args.transfer else []
    options += ["--micro-batch", str(args.micro_batch)] if args.micro_batch else []
    options += ["--parts", part, "--work", part, "--folder", str(args.folder), *(["--tiny"] if args.tiny else [])]
    variables = {**os.environ, "ACCELERATE_USE_CPU": str(not is_gpu(args.device)).lower()}
    subprocess.run([*start, "-m", "benchmarks.several_gpus", *options], env=variables, check=True)  # noqa: S603  itself
    return json.loads((args.folder / "found.json").read_text(encoding="utf-8"))


def work(args):
    """One process of many."""
    rank = int(os.environ["LOCAL_RANK"])
    device = torch.device(args.device, rank) if is_gpu(args.device) else torch.device(args.device)
    if is_gpu(device):
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if is_gpu(device) else "gloo")
    found = measured(args, device)
    if rank == 0:
        (args.folder / "found.json").write_text(json.dumps(found), encoding="utf-8")
    # gloo's threads of one process may still serve another
    dist.barrier()
    dist.destroy_process_group()
    if not is_gpu(device):
        # once in a while a thread of gloo's outlives its group, and its process aborts as it ends in order
        sys.stdout.flush()
        os._exit(0)


def measured(args, device):
    """What a part finds; diffusers and training are imported by their own parts alone."""
    if args.work == "step":
        from .several_gpus_step import measure_steps

        return measure_steps(args, device)
    if args.work == "stage2":
        from .several_gpus_training import stage2

        return stage2(args, device)
    return (attention if args.work == "attention" else timeline)(args, device)


def table(part, runs):
    if part == "step":
        from .several_gpus_step import step_table

        return step_table(runs)
    if part == "stage2":
        from .several_gpus_training import training_table

        return training_table(runs)
    return {"attention": attention_table, "timeline": timeline_table, "messages": messages_table}[part](runs)


if __name__ == "__main__":
    main()
