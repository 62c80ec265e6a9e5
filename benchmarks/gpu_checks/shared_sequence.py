"""What second_gpu.py runs on all GPUs at once, by torchrun: copies between GPUs give the bits of collectives.

Calls of several shapes follow each other without a wait of the host, some on another stream; the processes take turns at being
late, before a call and within attention. Prints how many calls there were, or why these GPUs cannot copy.
"""

import os

import torch
import torch.distributed as dist

from sla2_kernels import sla2_attention
from sla2_kernels.peer_copies import CannotCopy, peers_for
from sla2_kernels.sequence_parallel import sequence_parallel_attention

# (batch, tokens of a process, heads of a process, head_dim, dtype): ragged, of several sizes
SHAPES = (
    (1, 1013, 4, 128, torch.bfloat16),
    (2, 4100, 6, 64, torch.float16),
    (1, 501, 4, 128, torch.float32),
    (1, 9450, 10, 128, torch.bfloat16),
)
GROUPS = (1, 2, 4, 100, (1, 3, 1))
ROUNDS = 3
LATE = 3_000_000  # cycles, 1 to 2 ms
PRECISIONS = ("16bit", "int8")


def calls(processes):
    """(inputs of this process, options) of every call, in order."""
    count = 0
    for turn in range(ROUNDS):
        for groups in GROUPS:
            # from the largest to the smallest in every second round: buffers are divided otherwise
            for batch, tokens, heads, head_dim, dtype in SHAPES[:: 1 - 2 * (turn % 2)]:
                generator = torch.Generator("cuda").manual_seed(1000 * count + dist.get_rank())
                shape = batch, tokens, processes * heads, head_dim
                qkv = [torch.randn(shape, generator=generator, device="cuda").to(dtype) for _ in range(3)]
                yield qkv, {"groups": groups, "number": count}
                count += 1


def attend(number):
    """Two of three calls are attention; every third takes next to no time, so that exchanges follow closely."""

    def attended(q, k, v, heads):
        if number % 4 == dist.get_rank():
            torch.cuda._sleep(LATE)
        if number % 3 == 0 or q.dtype == torch.float32:
            return q + (heads.start + 1) * k.flip(1) - v.roll(3, dims=1)
        return sla2_attention(q, k, v, sparsity=0.9, layout="BNHD", precision=PRECISIONS[number % 2])

    return attended


def call(qkv, groups, number, transfer):
    if number % 5 == dist.get_rank():
        torch.cuda._sleep(LATE)
    return sequence_parallel_attention(*qkv, attend(number), head_groups=groups, transfer=transfer)


def on_another_stream(function):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = function()
    torch.cuda.current_stream().wait_stream(stream)
    return result


@torch.no_grad()
def main():
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    asked = list(calls(dist.get_world_size()))
    try:
        peers_for(asked[0][0][0], None, [slice(0, 1)])
    except CannotCopy as refused:
        said = f"no copies between these GPUs, collectives instead: {refused.reason}"
    else:
        expected = [call(qkv, **options, transfer="collective") for qkv, options in asked]
        copied = [
            on_another_stream(lambda qkv=qkv, options=options: call(qkv, **options, transfer="copies"))
            if options["number"] % 7 == 0
            else call(qkv, **options, transfer="copies")
            for qkv, options in asked
        ]
        unlike = [n for n, (a, b) in enumerate(zip(copied, expected, strict=True)) if not torch.equal(a, b)]
        if unlike:
            raise AssertionError(f"rank {rank}: other bits than by collectives in calls {unlike} of {len(asked)}")
        said = f"{len(asked)} calls by copies, all bits equal those of collectives"
    dist.barrier()
    if rank == 0:
        print(said)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
