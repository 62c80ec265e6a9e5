"""What test_peer_copies.py compares with one process, found by 2 and by 4: saved to the folder argv[1] by their number.

Files that the processes map take the place of GPU memory that they can read, and a thread that of the side stream.
"""

import queue
import random
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from sla2_kernels import sequence_parallel, sla2_attention
from sla2_kernels.peer_copies import Peers, _Slots
from sla2_kernels.sequence_parallel import sequence_parallel_attention

DELAY = 0.004  # seconds at most, before and after a pull
PATIENCE = 60  # seconds
# (batch, tokens of a process, heads, head_dim, dtype, groups of heads); a buffer grows with the first, third and last
CALLS = (
    (1, 13, 8, 16, torch.bfloat16, 2),
    (1, 13, 8, 16, torch.bfloat16, 2),
    (2, 150, 8, 32, torch.bfloat16, 1),
    (2, 150, 8, 32, torch.bfloat16, 100),
    (1, 97, 12, 5, torch.float16, (1, 3, 1)),
    (3, 31, 8, 3, torch.float64, 2),
    (1, 150, 8, 32, torch.float32, 2),
    (1, 150, 8, 32, torch.float32, 2),
    (2, 150, 8, 32, torch.bfloat16, 2),
    (1, 301, 12, 64, torch.bfloat16, 3),
)
REFUSED = (1, 400, 12, 64, torch.bfloat16, 2)


def bytes_of(call):
    batch, tokens, heads, head_dim, dtype, _ = call
    return batch * tokens * heads * head_dim * dtype.itemsize


class MappedPeers(Peers):
    """``limit``: bytes that this process can have."""

    def __init__(self, group, folder, barrier, limit):
        super().__init__(group, torch.device("cpu"))
        self._folder, self._barrier, self._limit, self._files = folder, barrier, limit, 0
        self._random = random.Random(self.rank)
        self._pending = queue.Queue()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        while True:
            pulls, done = self._pending.get()
            self._barrier.wait(PATIENCE)
            for into, process, offset in pulls:
                time.sleep(self._random.uniform(0, DELAY))
                assert into.is_contiguous()
                into.view(-1).view(torch.uint8).copy_(self.memory[process][offset : offset + into.nbytes])
            time.sleep(self._random.uniform(0, DELAY))
            done.set()
            self._pending.task_done()

    def _file(self, process):
        return self._folder / f"{self._files}-{process}"

    def _free(self):
        self._before_packing()
        self.capacity, self.memory = 0, []

    def _allocate(self, size):
        self._files += 1
        if size > self._limit:
            raise RuntimeError(f"{size} bytes are too many")
        self._file(self.rank).write_bytes(bytes(size))

    def _join(self, size):
        files = [str(self._file(process)) for process in range(self.processes)]
        self.memory = [torch.from_file(file, shared=True, size=size, dtype=torch.uint8) for file in files]

    def _before_packing(self):
        self._pending.join()

    def fetch(self, pulls):
        done = threading.Event()
        self._pending.put((pulls, done))
        return done

    def wait(self, fetched):
        assert fetched.wait(PATIENCE)


def qkv(call, processes, seed):
    """Whole tensors, their last dimensions a part of wider ones in every second call."""
    batch, tokens, heads, head_dim, dtype, _ = call
    generator = torch.Generator().manual_seed(seed)
    width = head_dim * (1 + seed % 2)
    whole = torch.randn(3, batch, processes * tokens, heads, width, generator=generator, dtype=torch.float64)
    return whole.to(dtype)[..., :head_dim].unbind(0)


def attend(q, k, v, heads):
    """Exact whatever the strides, and different for each head and order of tokens."""
    return q + (heads.start + torch.arange(q.shape[2], dtype=q.dtype))[:, None] * k.flip(1) - v.roll(3, dims=1)


def attend_sparsely(q, k, v, heads):
    return sla2_attention(q, k, v, sparsity=0.6, layout="BNHD")


class Failed(Exception):
    pass


def failing(rank, at):
    """An attend() that fails in process 0 with the first group of heads, and in process 1 with that of index ``at``, if any."""
    calls = []

    def attend_or_fail(q, k, v, heads):
        calls.append(heads)
        if (rank == 0 and at is not None) or (rank == 1 and len(calls) - 1 == (at or 1)):
            raise Failed
        return attend(q, k, v, heads)

    return attend_or_fail


def copied(call, seed, group, attend=attend, transfer="copies"):
    processes, rank = dist.get_world_size(group), dist.get_rank(group)
    share = [x.chunk(processes, dim=1)[rank] for x in qkv(call, processes, seed)]
    # no tensor of one mode may keep the other from writing
    with torch.inference_mode() if seed % 3 == 0 else torch.no_grad():
        return sequence_parallel_attention(*share, attend, group, head_groups=call[-1], transfer=transfer)


def gathered(part, group):
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part, group=group)
    return torch.cat(parts, dim=1)


def work(rank, processes, folder, barriers):
    """One process of several; rank 0 saves what they found. Of four, the even ones are a group, and so are the odd ones."""
    store = dist.FileStore(str(folder / f"store{processes}"), processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    found = {}
    groups = {"all": (None, barriers[0])}
    if processes == 4:
        halves = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
        groups["half"] = halves[rank % 2], barriers[1 + rank % 2]
    for name, (group, barrier) in groups.items():
        files = folder / f"{processes}-{name}-{rank % 2 if name == 'half' else 0}"
        files.mkdir(exist_ok=True)
        # the last process alone has no more than the calls need
        size = dist.get_world_size(group)
        limit = 4.5 * bytes_of(CALLS[-1]) * (size - 1) / size if dist.get_rank(group) == size - 1 else 2**40
        peers = MappedPeers(group or dist.group.WORLD, files, barrier, limit)

        def peers_for(q, group, head_groups, peers=peers):
            peers.reserve(_Slots(q, peers.processes, head_groups).capacity)
            return peers

        sequence_parallel.peers_for = peers_for
        for seed, call in enumerate(CALLS):
            found[name, seed] = copied(call, seed, group)
        found[name, "sparse"] = copied(CALLS[6], 1, group, attend_sparsely)
        for at in (None, 0, 1):
            try:
                found[name, "beside a failed one", at] = copied(CALLS[0], 2, group, failing(peers.rank, at))
            except Failed:
                found[name, "beside a failed one", at] = torch.zeros(1, CALLS[0][1], 8, 16, dtype=CALLS[0][4])
            found[name, "after a failed one", at] = copied(CALLS[0], 4, group)
        found[name, "capacity"] = torch.tensor([[peers.capacity]])
        try:
            copied(REFUSED, 1, group)
        except RuntimeError as error:
            found[name, "refused"] = str(error)
        found[name, "collective"] = copied(REFUSED, 1, group, transfer="auto")
        found[name, "again"] = copied(CALLS[-1], 5, group)
        for key, value in found.items():
            if key[0] == name and torch.is_tensor(value):
                found[key] = gathered(value, group)
    if rank == 0:
        torch.save(found, folder / f"{processes}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    fork = torch.multiprocessing.get_context("fork")
    for number in (2, 4):
        barriers = [fork.Barrier(number), fork.Barrier(2), fork.Barrier(2)]
        arguments = number, Path(sys.argv[1]), barriers
        torch.multiprocessing.start_processes(work, arguments, number, start_method="fork")
