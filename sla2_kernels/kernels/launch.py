"""Launching kernels, and launching all of a call's kernels again without the Python that led to them.

What a call launches depends on its settings and on its tensors' dtypes, shapes, strides and 16-byte alignment alone; from
call to call only addresses differ. The first call of a kind is recorded, later ones are played back with the addresses
of their own tensors: at short lengths the host would otherwise take longer than the GPU.
"""

import threading
from dataclasses import dataclass, field

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from triton.runtime.driver import driver

from ..support import is_tested_triton

MOST_PLANS = 256
# The releases whose compiled kernels take every argument, constants included, in the order of Plan.play(): a private
# interface, the same in their sources. With others every call goes through the front end.
DIRECT_RELEASES = ((3, 6), (3, 7), (3, 8), (3, 9))
DIRECT = is_tested_triton(DIRECT_RELEASES)

_plans = {}  # oldest first
_plans_change = threading.Lock()


def why_not_direct():
    """None where calls are played back, or one sentence why each goes through Triton's front end."""
    if DIRECT:
        return None
    first, last = (".".join(map(str, release)) for release in (DIRECT_RELEASES[0], DIRECT_RELEASES[-1]))
    return f"every launch goes through Triton's front end: what avoids it was tested with Triton {first} to {last}"


def planned(tensors, settings, call):
    """Does call(plan), in which every kernel goes through launch(plan, ...), or plays back what an equal call launched.

    tensors: all that the call gets and what it returns, filled by kernels alone; None allowed. settings: hashable, all
    else that decides what the call launches. What else the kernels read and write, the call makes by torch.empty() and
    fills by kernels. On the CPU, where nothing is compiled, plan is None.
    """
    if not (DIRECT and tensors[0].is_cuda):
        call(None)
        return
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    which_are_one = map(addresses.index, addresses)
    key = torch.cuda.current_device(), settings, *map(_signature, tensors, addresses), *which_are_one
    plan = _plans.get(key)
    if plan is not None:
        plan.play(addresses, tensors[0].device)
        return
    plan = Plan(tensors)
    call(plan)
    plan.finish()
    with _plans_change:
        if len(_plans) >= MOST_PLANS:
            del _plans[next(iter(_plans))]
        _plans[key] = plan


def _signature(tensor, address):
    return None if tensor is None else (tensor.dtype, tensor.shape, tensor.stride(), address % 16 == 0)


def launch(plan, kernel, grid, *args, options, **constants):
    """kernel[grid](*args, **constants, **options), which ``plan`` records, if there is one.

    options: num_warps and the like.
    """
    compiled = kernel[grid](*args, **constants, **options)
    if plan is not None:
        plan.add(compiled, grid, [*args, *(constants[name] for name in kernel.arg_names[len(args) :])])


class _Address:
    """What a TMA descriptor's base is asked for when a kernel is launched."""

    def __init__(self, address):
        self._address = address

    def data_ptr(self):
        return self._address


@dataclass
class _Step:
    """One launch. pointers, descriptors: (place among the arguments, slot, bytes behind its address)."""

    compiled: object
    grid: tuple
    arguments: list
    pointers: list = field(default_factory=list)
    descriptors: list = field(default_factory=list)
    first_uses: list = field(default_factory=list)
    last_uses: list = field(default_factory=list)

    def slots(self):
        return {slot for _, slot, _ in (*self.pointers, *self.descriptors)}


class Plan:
    """The launches of one call. Slots are its tensors, then the buffers that it made, which live from first to last use."""

    def __init__(self, tensors):
        """tensors: the call's own, None where there is none."""
        self._steps = []
        self._outside = tensors
        self._slots = {x.data_ptr(): slot for slot, x in reversed(list(enumerate(tensors))) if x is not None}
        self._buffers = {}  # a weak reference tells a buffer from a later one at its address
        self._sizes = {}
        self._count = len(tensors)

    def add(self, compiled, grid, arguments):
        """Records a launch that was made."""
        step = _Step(compiled, (*grid, 1, 1)[:3], arguments)
        for place, argument in enumerate(arguments):
            if isinstance(argument, torch.Tensor):
                step.pointers.append((place, *self._slot(argument)))
                arguments[place] = 0
            elif hasattr(argument, "block_shape"):
                step.descriptors.append((place, *self._slot(argument.base)))
                arguments[place] = _at(argument, 0)
        self._steps.append(step)

    def _slot(self, tensor):
        """(slot, bytes behind its address) of one of the call's tensors, or of a view of a buffer.

        Raises ValueError for a view that begins inside one of the call's tensors: where it begins in the next call's
        is not known, as tensors that share memory need not lie in it as these do.
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
        """Ends the recording: finds the first and last use of every buffer."""
        self._buffers = self._outside = self._slots = None
        first, last = {}, {}
        for step in self._steps:
            for slot in sorted(step.slots() & self._sizes.keys()):
                first.setdefault(slot, step)
                last[slot] = step
        for slot in self._sizes:
            first[slot].first_uses.append(slot)
            last[slot].last_uses.append(slot)

    def play(self, addresses, device):
        """Launches all again on the current stream of ``device``, the current one, with other tensors' addresses."""
        addresses = [*addresses, *[0] * len(self._sizes)]
        kept = {}
        stream = driver.active.get_current_stream(driver.active.get_current_device())
        for step in self._steps:
            for slot in step.first_uses:
                kept[slot] = torch.empty(self._sizes[slot], dtype=torch.uint8, device=device)
                addresses[slot] = kept[slot].data_ptr()
            arguments = step.arguments.copy()
            for place, slot, offset in step.pointers:
                arguments[place] = addresses[slot] + offset
            for place, slot, offset in step.descriptors:
                arguments[place] = _at(arguments[place], addresses[slot] + offset)
            compiled = step.compiled
            # compiled[grid](...) also prepares for launch hooks: a profiler that sets them sees recorded calls alone
            compiled.run(*step.grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)
            for slot in step.last_uses:
                del kept[slot]


def _at(descriptor, address):
    """The TMA descriptor with another address."""
    moved = object.__new__(type(descriptor))  # its constructor asks more of its base
    moved.__dict__ = {**descriptor.__dict__, "base": _Address(address)}
    return moved
