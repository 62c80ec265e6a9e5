"""What several processes of one measurement share: times of the slowest, the largest of their numbers."""

import statistics
import time

import torch
import torch.distributed as dist

from .measure import is_gpu

SPARSITY = 0.97
WARMUP = 5  # calls, and training steps, that are not timed


def largest(number, device):
    """The largest of all processes' numbers."""
    found = torch.tensor([number], device=device, dtype=torch.float32)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def slowest_ms(function, device, calls=20, warmup=WARMUP):
    """Median over calls of the time until the last process is done."""
    return each_slowest_ms([function], device, calls, warmup)[0]


def each_slowest_ms(functions, device, calls=20, warmup=WARMUP, in_a_row=1):
    """slowest_ms() of each function: they take turns, all are warmed up before the first is timed.

    in_a_row: so many calls follow each other without a wait, as in a model, where the host runs ahead; the time is that of one.
    """
    times = [[] for _ in functions]
    for call in range(warmup + (calls if is_gpu(device) else 1)):
        for function, found in zip(functions, times, strict=True):
            dist.barrier()
            if is_gpu(device):
                torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(in_a_row):
                function()
            if is_gpu(device):
                torch.cuda.synchronize()
            taken = largest(1000 * (time.perf_counter() - begin) / in_a_row, device)
            if call >= warmup:
                found.append(taken)
    return [statistics.median(found) for found in times]
