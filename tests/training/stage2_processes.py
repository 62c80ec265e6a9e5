"""Stage 2's command in several processes, for test_stage2.py: each group of runs in so many processes at once.

stage2_processes.py JSON, a list of [number of processes, [the command's argument lists]]

One process imports torch, diffusers and accelerate, and starts the others by fork: importing takes longer than all else.
"""

import json
import os
import socket
import sys

import torch

import sla2_training.stage2.wan  # noqa: F401  imported here, not in each process
from sla2_training.stage2.__main__ import load_student, main  # noqa: F401


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def work(rank, processes, port, runs):
    if processes > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
    for arguments in runs:
        code = main(arguments)
        sys.stdout.flush()
        if code:
            raise SystemExit(code)
    if processes > 1:
        # gloo's threads of one process may still serve another
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    from diffusers import WanTransformer3DModel  # noqa: F401  the class: the package alone imports almost nothing
    from torch.distributed import checkpoint, fsdp  # noqa: F401

    for count, commands in json.loads(sys.argv[1]):
        torch.multiprocessing.start_processes(work, (count, free_port(), commands), count, start_method="fork")
