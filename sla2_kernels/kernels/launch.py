"""Launching kernels, and a cache of launches: the second call of a kind skips the Python that prepared the first.

What a call launches depends only on its settings and on its tensors' dtypes, shapes, strides and 16-byte alignment; from
call to call nothing but addresses differs. The first call of a kind is recorded and later ones are replayed with the
addresses of their own tensors: at short lengths the host would otherwise take longer than the GPU. Launches that need not
wait for each other are replayed on two streams, so that one fills the multiprocessors that the other leaves idle.
"""

import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import itemgetter

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from triton.runtime.driver import driver

from ..support import is_tested_triton

MAX_RECORDINGS = 256
STREAMS = 2  # one for each lane
ALIGNMENT = 512  # bytes, of a buffer within its memory: that of torch's allocator
FUSED = True  # a product and a sum in one instruction: Triton 3.9 warns that from 3.10 on it must be asked for
# The releases whose compiled kernels take every argument, constants included, in the order of Recording._plan(): a
# private interface, the same in all their sources. With other releases every call goes through the front end.
DIRECT_RELEASES = ((3, 6), (3, 7), (3, 8), (3, 9))
DIRECT = is_tested_triton(DIRECT_RELEASES)

_recordings = {}  # oldest first
_recordings_lock = threading.Lock()
# .recording: what launches of this thread are added to; .lane: which of a call's streams they take; .streams: by device, those
# beside the current one
_thread = threading.local()


def why_not_direct():
    """None where calls are replayed, or one sentence why each goes through Triton's front end."""
    if DIRECT:
        return None
    first, last = (".".join(map(str, release)) for release in (DIRECT_RELEASES[0], DIRECT_RELEASES[-1]))
    return f"every launch goes through Triton's front end: what avoids it was tested with Triton {first} to {last}"


def cached(tensors, settings, call):
    """Runs call(), whose kernels all go through launch(), or replays what an equal call launched.

    tensors: all that the call reads from outside and all that it returns, filled by kernels only; None allowed. settings:
    hashable, everything else that decides what the call launches. Other buffers of its kernels the call must make with
    torch.empty() and fill by kernels. On the CPU, where nothing is compiled, nothing is recorded.
    """
    if not (DIRECT and tensors[0].is_cuda):
        call()
        return
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    # two arguments that are the same tensor take other launches than two that are not
    aliases = map(addresses.index, addresses)
    key = torch.cuda.current_device(), settings, *map(_signature, tensors, addresses), *aliases
    recording = _recordings.get(key)
    if recording is not None:
        recording.replay(addresses, tensors[0].device)
        return
    recording = Recording(tensors)
    with _added_to(recording):
        call()
    recording.finish()
    with _recordings_lock:
        if len(_recordings) >= MAX_RECORDINGS:
            del _recordings[next(iter(_recordings))]
        _recordings[key] = recording


@contextmanager
def _added_to(recording):
    _thread.recording = recording
    try:
        yield
    finally:
        _thread.recording = None


@contextmanager
def lane(number):
    """Launches inside wait for no launch of another lane, 0 or 1, when the call is replayed.

    A call's launches in lanes stand together: they wait for all before the first of them, and those after the last wait for
    them. No lane may read or write what another writes.
    """
    _thread.lane = number
    try:
        yield
    finally:
        _thread.lane = None


def _signature(tensor, address):
    return None if tensor is None else (tensor.dtype, tensor.shape, tensor.stride(), address % 16 == 0)


def launch(kernel, grid, *args, options, **constants):
    """kernel[grid](*args, **constants, **options); recorded where this thread is inside cached().

    options: num_warps and the like.
    """
    compiled = kernel[grid](*args, **constants, **options, enable_fp_fusion=FUSED)
    recording = getattr(_thread, "recording", None)
    if recording is not None:
        recording.add(compiled, grid, [*args, *(constants[name] for name in kernel.arg_names[len(args) :])])


class _Address:
    """All that a launch asks of a TMA descriptor's base."""

    def __init__(self, address):
        self._address = address

    def data_ptr(self):
        return self._address


@dataclass
class _Step:
    """One launch. pointers, descriptors: (place among the arguments, slot, offset in bytes from the slot's address)."""

    compiled: object
    grid: tuple
    arguments: list
    lane: int | None = None
    pointers: list = field(default_factory=list)
    descriptors: list = field(default_factory=list)

    def slots(self):
        return {slot for _, slot, _ in (*self.pointers, *self.descriptors)}


@dataclass
class _Life:
    """Of a buffer: its bytes, the first and the last launch that uses it, and the lanes that do."""

    size: int
    first: int
    last: int
    lanes: set = field(default_factory=set)

    def meets(self, other):
        """Whether both may be in use at a time: launches of two lanes come in no order."""
        in_no_order = self.lanes and other.lanes and len(self.lanes | other.lanes) > 1
        return in_no_order or (self.first <= other.last and other.first <= self.last)


def _placed(lives):
    """({slot: offset}, bytes in all) of buffers in one piece of memory; lives: {slot: _Life}.

    Two buffers share a place only where one's last use comes before the other's first. The large ones are placed first, each
    as low as it fits.
    """
    offsets = {}
    for slot, life in sorted(lives.items(), key=lambda item: -item[1].size):
        beside = [other for other in offsets if lives[other].meets(life)]
        offset = 0
        for other in sorted(beside, key=offsets.get):
            if offset + life.size <= offsets[other]:
                break
            end = offsets[other] + lives[other].size
            offset = max(offset, -(-end // ALIGNMENT) * ALIGNMENT)
        offsets[slot] = offset
    return offsets, max((offsets[slot] + lives[slot].size for slot in offsets), default=0)


def _current_and_beside():
    """The current stream of the current device, and this thread's own beside it."""
    current = torch.cuda.current_stream()
    streams = _thread.__dict__.setdefault("streams", {})
    if current.device not in streams:
        # of this thread alone: a CUDA graph that captures one takes in all that is launched there
        streams[current.device] = torch.cuda.Stream(current.device)
    return current, streams[current.device]


class Recording:
    """The launches of one call. Slots are its tensors, then the buffers that it made, which share one piece of memory."""

    def __init__(self, tensors):
        """tensors: the call's own, None where there is none."""
        self._steps = []
        self._outside = tensors
        self._slots = {x.data_ptr(): slot for slot, x in reversed(list(enumerate(tensors))) if x is not None}
        # by weak reference: the allocator may give a later buffer the address of one that is gone
        self._buffers = {}
        self._sizes = {}
        self._count = len(tensors)

    def add(self, compiled, grid, arguments):
        """Records a launch that was made."""
        step = _Step(compiled, (*grid, 1, 1)[:3], arguments, getattr(_thread, "lane", None))
        for place, argument in enumerate(arguments):
            if isinstance(argument, torch.Tensor):
                step.pointers.append((place, *self._slot(argument)))
                arguments[place] = 0
            elif hasattr(argument, "block_shape"):
                step.descriptors.append((place, *self._slot(argument.base)))
                arguments[place] = _at(argument, 0)
        self._steps.append(step)

    def _slot(self, tensor):
        """(slot, offset in bytes) of one of the call's tensors, or of a view of a buffer.

        Raises ValueError for a view that begins inside one of the call's tensors: the next call's tensors may share
        memory in another way, so where the view would begin there is not known.
        """
        address = tensor.data_ptr()
        if address in self._slots:
            return self._slots[address], 0
        storage = tensor.untyped_storage()
        if any(x is not None and x.untyped_storage().data_ptr() == storage.data_ptr() for x in self._outside):
            raise ValueError("a kernel of a recorded call got a view that begins inside one of the call's tensors.")
        slot = self._buffers.setdefault(StorageWeakRef(storage), self._count + len(self._buffers))
        self._sizes[slot] = storage.nbytes()
        return slot, address - storage.data_ptr()

    def finish(self):
        """Ends the recording: finds a place for every buffer, from its first to its last use."""
        self._buffers = self._outside = self._slots = None
        lives = {}
        for number, step in enumerate(self._steps):
            for slot in step.slots() & self._sizes.keys():
                life = lives.setdefault(slot, _Life(self._sizes[slot], number, number))
                life.last = number
                life.lanes |= set() if step.lane is None else {step.lane}
        offsets, self._bytes = _placed(lives)
        self._offsets = [offsets[slot] for slot in sorted(offsets)]
        self._plan()

    def _plan(self):
        """Puts all that the launches take into one list, whose beginning replay() fills: streams, addresses, descriptors."""
        steps, self._steps = self._steps, None
        in_lanes = [number for number, step in enumerate(steps) if step.lane is not None]
        # where the launches in lanes begin and end
        self._fork, self._join = (in_lanes[0], in_lanes[-1] + 1) if in_lanes else (len(steps), len(steps))
        if len(in_lanes) != self._join - self._fork:
            raise ValueError("a launch between those in lanes is in none.")
        self._forks = len({steps[number].lane for number in in_lanes}) > 1
        self._pointers = list(dict.fromkeys((slot, offset) for step in steps for _, slot, offset in step.pointers))
        self._descriptors = [(step.arguments[place], *at) for step in steps for place, *at in step.descriptors]
        self._rest, self._launches = [], []
        place_of = {at: STREAMS + number for number, at in enumerate(self._pointers)}
        descriptor_at = STREAMS + len(self._pointers)
        rest_at = descriptor_at + len(self._descriptors)
        for step in steps:
            compiled = step.compiled
            # compiled[grid](...) also prepares for launch hooks: a profiler that sets them sees recorded calls alone
            before = [*step.grid, None, compiled.function, compiled.packed_metadata, None, None, None]
            taken = before + step.arguments
            first = rest_at + len(self._rest)
            picked = list(range(first, first + len(taken)))
            picked[len(step.grid)] = step.lane or 0
            for place, *at in step.pointers:
                picked[len(before) + place] = place_of[tuple(at)]
            for place, *_ in step.descriptors:
                picked[len(before) + place], descriptor_at = descriptor_at, descriptor_at + 1
            self._rest += taken
            self._launches.append((compiled.run, itemgetter(*picked)))

    def replay(self, addresses, device):
        """Launches everything again, with other tensors' addresses, on the current stream of the current device."""
        memory = torch.empty(self._bytes, dtype=torch.uint8, device=device)
        base = memory.data_ptr()
        addresses = [*addresses, *[base + offset for offset in self._offsets]]
        if self._forks:
            current, beside = _current_and_beside()
            values = [current.cuda_stream, beside.cuda_stream]
        else:
            values = [driver.active.get_current_stream(driver.active.get_current_device())] * STREAMS
        values += [addresses[slot] + offset for slot, offset in self._pointers]
        values += [_at(descriptor, addresses[slot] + offset) for descriptor, slot, offset in self._descriptors]
        values += self._rest
        if not self._forks:
            _launch(self._launches, values)
            return
        _launch(self._launches[: self._fork], values)
        beside.wait_stream(current)
        try:
            _launch(self._launches[self._fork : self._join], values)
        finally:
            # also where a launch fails: from here on the memory is free for what the current stream runs next
            current.wait_stream(beside)
        _launch(self._launches[self._join :], values)


def _launch(launches, values):
    for run, pick in launches:
        run(*pick(values))


def _at(descriptor, address):
    """The TMA descriptor with another address."""
    moved = object.__new__(type(descriptor))  # its constructor asks more of its base
    moved.__dict__ = {**descriptor.__dict__, "base": _Address(address)}
    return moved
