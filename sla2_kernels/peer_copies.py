"""The exchanges of sequence_parallel.py as copies between GPUs that can read each other's memory.

A collective runs on the multiprocessors that attention needs, a contiguous copy from another GPU on a copy engine. So each
process packs what the others need into a buffer that they can read (torch's symmetric memory), and each pulls its parts from
there to where they are used. Its own part is never packed.

Barriers and pulls of a group of processes run on one side stream, in every call in one order: a barrier and the pulls of q, k
and v for each group of heads, then a barrier and the pulls of the output for each. Nothing else keeps a buffer from being
overwritten while another process reads it:

- q, k and v are packed behind the last call's barriers of outputs, which every process reaches behind its pulls of q, k, v;
- an output is packed behind this call's barrier of q, k and v, which every process reaches behind the last call's pulls of
  outputs. Both have regions of their own, so this holds for calls of different shapes too.
"""

import logging
import os
import platform
import weakref
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from .support import kernels_reason, on_device

logger = logging.getLogger(__name__)

ALIGNMENT = 256  # bytes
TIMEOUT_MS = 600_000  # how long a barrier waits for the other processes: as long as NCCL does by default
WITHOUT_MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"
# what torch raises where it has no such memory, or another release of it no such function
NO_MEMORY = (RuntimeError, ImportError, AttributeError, TypeError, ValueError, OSError)
BOOT = Path("/proc/sys/kernel/random/boot_id")

_known = weakref.WeakKeyDictionary()  # process group -> Peers, or why its GPUs cannot copy


class CannotCopy(RuntimeError):
    """The processes of a group cannot exchange by copies. reason: why, without a full stop."""

    def __init__(self, reason):
        super().__init__(f"the processes cannot exchange by copies: {reason}.")
        self.reason = reason


def peers_for(q, group, head_groups):
    """Peers with memory for a call; raises CannotCopy in all processes of the group or in none.

    The first call of a process group, and calls that need more memory than those before, must be made by all its processes.

    Args:
        q: (B, N / P, H, D), as q, k and v of the call.
        group: process group; None is all processes.
        head_groups: slices of the H / P heads of a process.
    """
    reason = _why_not_here(q, group)
    if reason:
        raise CannotCopy(reason)
    group = dist.group.WORLD if group is None else group
    with on_device(q.device):
        if group not in _known:
            reason = _agreed(_why_unreachable(q.device, _told_by_all(_myself(q.device), group)), group)
            _known[group] = reason or Peers(group, q.device)
            if reason:
                logger.info("SLA2: the GPUs exchange heads by collectives, not by copies: %s", reason)
        peers = _known[group]
        if isinstance(peers, str):
            raise CannotCopy(peers)
        if peers.device != q.device:
            raise CannotCopy(f"the group's calls before were on {peers.device}, this one is on {q.device}")
        peers.reserve(_Slots(q, peers.processes, head_groups).capacity)
    return peers


def _why_not_here(q, group):
    """None, or why this call exchanges by collectives, whatever the GPUs can do."""
    if torch.compiler.is_compiling():
        return "torch.compile traces the call"
    if q.device.type != "cuda":
        return f"the tensors are on {q.device.type}"
    if torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is captured"
    if dist.get_world_size(group) == 1 or q.numel() == 0:
        return "there is nothing to exchange"
    return None


def _myself(device):
    """(host, GPU, whether torch has symmetric memory) of this process."""
    try:
        import torch.distributed._symmetric_memory  # noqa: F401  only whether it is there

        known = True
    except ImportError:
        known = False
    boot = BOOT.read_text() if BOOT.exists() else ""
    return f"{platform.node()} {boot}", str(torch.cuda.get_device_properties(device).uuid), known


def _why_unreachable(device, processes):
    """None, or why the GPU of one of ``processes``, as _myself() describes them, cannot be read from ``device``."""
    hosts, gpus, known = zip(*processes, strict=True)
    if not all(known):
        return "this torch has no symmetric memory"
    if len(set(hosts)) > 1:
        return "the processes are on several hosts"
    if len(set(gpus)) < len(gpus):
        return "processes share a GPU"
    visible = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
    if not visible.keys() >= set(gpus):
        return "not every process sees the GPUs of the others (CUDA_VISIBLE_DEVICES)"
    others = [visible[gpu] for gpu in gpus if visible[gpu] != device.index]
    unreadable = [other for other in others if not torch.cuda.can_device_access_peer(device.index, other)]
    return f"GPU {device.index} cannot read the memory of GPU {unreadable[0]}" if unreadable else None


def _told_by_all(what, group):
    told = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, what, group=group)
    return told


def _agreed(reason, group):
    """None where it is None in all processes of the group, else what the first of the others said."""
    return next((one for one in _told_by_all(reason, group) if one), None)


class Peers:
    """Memory of each process of a group that all of them read, and the stream on which they do."""

    def __init__(self, group, device):
        self.processes, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.capacity = 0  # bytes of each process
        self.memory = []  # uint8 (capacity,) of each process
        self.device = device
        # a group that was destroyed takes its memory along
        self._group, self._name = weakref.ref(group), group.group_name
        self._refused = self._buffer = self._handle = self._side = None

    def reserve(self, size):
        """After it the current stream may pack; raises CannotCopy where there are no ``size`` bytes."""
        if self._refused is not None and size >= self._refused[0]:
            raise CannotCopy(self._refused[1])
        if size > self.capacity:
            # under inference_mode too: no tensor made there could be written elsewhere
            with torch.inference_mode(False):
                reason = self._grow(size)
            if reason:
                self._refused = size, reason
                logger.warning("SLA2: the GPUs exchange heads by collectives, not by copies: %s", reason)
                raise CannotCopy(reason)
        self._before_packing()

    def _grow(self, size):
        """None, or why one of the processes has no such memory."""
        self._free()
        for step in (self._allocate, self._join):
            error = None
            try:
                step(size)
            except NO_MEMORY as failure:
                said = f"{type(failure).__name__}: {failure}".splitlines()[0]
                error = f"there are no {size / 1e6:.0f} MB that other GPUs can read ({said})"
            reason = _agreed(error, self._group())
            if reason:
                self._free()
                return reason
        self.capacity = size
        return None

    def _free(self):
        torch.cuda.synchronize(self.device)
        self.capacity, self.memory = 0, []
        self._handle = self._buffer = None

    def _allocate(self, size):
        from torch._C._distributed_c10d import _SymmetricMemory

        def buffer():
            # not symm_mem.empty(): in its pool a tensor may lie anywhere in what the others map
            return _SymmetricMemory.empty_strided_p2p((size,), (1,), torch.uint8, self.device, self._name)

        try:
            self._buffer = buffer()
        except RuntimeError:
            torch.cuda.empty_cache()
            self._buffer = buffer()

    def _join(self, size):
        """Maps the others' memory."""
        from torch.distributed._symmetric_memory import rendezvous

        with _without_multicast():
            self._handle = rendezvous(self._buffer, self._name)
        self.memory = [self._handle.get_buffer(p, (size,), torch.uint8) for p in range(self.processes)]
        # the barriers' small kernels go before programs of attention that wait for a multiprocessor
        self._side = self._side or torch.cuda.Stream(self.device, priority=-1)

    def _before_packing(self):
        torch.cuda.current_stream(self.device).wait_stream(self._side)

    def fetch(self, pulls):
        """Starts copies behind a barrier of all processes, which is behind what the current stream has so far.

        pulls: (contiguous tensor, process, offset in its memory) each. Returns what wait() takes.
        """
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            self._handle.barrier(channel=0, timeout_ms=TIMEOUT_MS)
            for into, process, offset in pulls:
                into.flatten().view(torch.uint8).copy_(self.memory[process][offset : offset + into.nbytes])
        return self._side.record_event()

    def wait(self, fetched):
        """The current stream waits for what fetch() started, not the host."""
        torch.cuda.current_stream(self.device).wait_event(fetched)


@contextmanager
def _without_multicast():
    """Nothing here needs it, and where the driver's is broken, to set it up fails or hangs."""
    before = os.environ.get(WITHOUT_MULTICAST)
    os.environ[WITHOUT_MULTICAST] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[WITHOUT_MULTICAST]
        else:
            os.environ[WITHOUT_MULTICAST] = before


class _Slots:
    """Where in the memory of a process lies what it packs for each of the others, per group of heads.

    Three quarters of the memory are for q, k and v, one for outputs. A process has no slot for itself.
    """

    def __init__(self, q, processes, head_groups):
        batch, tokens, _, head_dim = q.shape
        self._dtype, self._others = q.dtype, processes - 1
        self._shapes = [(tokens, batch, part.stop - part.start, head_dim) for part in head_groups]
        self._bytes = [batch * tokens * head_dim * (part.stop - part.start) * q.element_size() for part in head_groups]
        self._sizes = [-(-count // ALIGNMENT) * ALIGNMENT for count in self._bytes]
        self.capacity = 4 * self._others * sum(self._sizes)

    def offset(self, peers, index, output, source, destination):
        """In the memory of process ``source``, for process ``destination``; of the group of heads ``index``."""
        first = self._others * sum(self._sizes[:index]) + (destination - (destination > source)) * self._sizes[index]
        return peers.capacity // 4 * 3 + first if output else 3 * first

    def own(self, peers, index, output):
        """What this process packs for the others: (P - 1, N / P, B, 1, G, D) of an output, else (P - 1, N / P, B, 3, G, D)."""
        begin = self.offset(peers, index, output, peers.rank, 1 if peers.rank == 0 else 0)
        tokens, batch, *heads = self._shapes[index]
        times = 1 if output else 3
        size = times * self._sizes[index]
        slots = peers.memory[peers.rank][begin : begin + self._others * size].unflatten(0, (self._others, size))
        return slots[:, : times * self._bytes[index]].view(self._dtype).unflatten(1, (tokens, batch, times, *heads))


def attention_by_copies(q, k, v, attend, head_groups, peers):
    """sequence_parallel_attention() for tensors without gradients.

    head_groups: slices of the H / P heads of a process. peers: Peers that have reserved what peers_for() asks for.
    """
    processes, rank = peers.processes, peers.rank
    batch, tokens, heads, head_dim = q.shape
    share = heads // processes
    slots = _Slots(q, processes, head_groups)
    others = [(rank + step) % processes for step in range(1, processes)]  # from different ones at a time
    # the others before and after this process: (among the processes, among the slots)
    ranges = [(slice(0, rank), slice(0, rank)), (slice(rank + 1, processes), slice(rank, processes - 1))]
    ranges = [pair for pair in ranges if pair[1].start < pair[1].stop]
    own = slice(rank, rank + 1)
    # (P, N / P, B, H / P, D)
    qkv = [x.unflatten(2, (processes, share)).permute(2, 1, 0, 3, 4) for x in (q, k, v)]
    widths = [part.stop - part.start for part in head_groups]
    # token before batch: what comes forms one sequence, and q, k and v are views of it
    received = [q.new_empty(processes, tokens, batch, 3, width, head_dim) for width in widths]
    returned = [q.new_empty(processes - 1, tokens, batch, width, head_dim) for width in widths]
    result = q.new_empty(batch, tokens, processes, share, head_dim)
    # (P, N / P, B, 1, H / P, D)
    places = result.permute(2, 1, 0, 3, 4).unsqueeze(3)
    fetched = []

    def fetch(index, output, into):
        at = [slots.offset(peers, index, output, p, rank) for p in others]
        fetched.append(peers.fetch(list(zip(into, others, at, strict=True))))

    try:
        for index, part in enumerate(head_groups):
            packed = slots.own(peers, index, False)
            for there, slot in ranges:
                _copy(packed[slot], [x[there, :, :, part] for x in qkv])
            fetch(index, False, [received[index][p] for p in others])
        # beside the first group's pulls
        for into, part in zip(received, head_groups, strict=True):
            _copy(into[own], [x[own, :, :, part] for x in qkv])
        for index, part in enumerate(head_groups):
            peers.wait(fetched[index])
            whole = received[index].flatten(0, 1).transpose(0, 1).unbind(2)
            out = attend(*whole, slice(rank * share + part.start, rank * share + part.stop)).to(q.dtype)
            received[index] = whole = None
            # (P, N / P, B, G, D)
            out = out.unflatten(1, (processes, tokens)).permute(1, 2, 0, 3, 4)
            packed = slots.own(peers, index, True)
            for there, slot in ranges:
                _copy(packed[slot], [out[there]])
            fetch(index, True, [returned[index][p - (p > rank)] for p in others])
            _copy(places[own, :, :, :, part], [out[own]])
        for index, part in enumerate(head_groups):
            peers.wait(fetched[len(head_groups) + index])
            for there, slot in ranges:
                _copy(places[there, :, :, :, part], [returned[index][slot]])
    except BaseException:
        # the others find NaN, and every process ends behind the same barriers
        for index in range(len(fetched) - len(head_groups), len(head_groups)):
            if index >= 0:
                peers.wait(fetched[index])
                slots.own(peers, index, True).fill_(torch.nan)
            fetched.append(peers.fetch([]))
        peers.wait(fetched[-1])
        raise
    return result.flatten(2, 3)


def _copy(into, sources):
    """into[:, :, :, place] = sources[place], in one launch where Triton's kernels run."""
    if kernels_reason(into.device):
        for place, x in enumerate(sources):
            into[:, :, :, place] = x
        return
    from .kernels.copy_heads import copy_heads

    with on_device(into.device):
        copy_heads(into, sources)
