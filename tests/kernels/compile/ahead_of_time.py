"""Compiling the package's own launches for a card that is not there.

The operator runs on CPU tensors, and every launch goes through Triton's own binder, specialisation and compiler, for the
card that a stand-in for the driver names; only the kernel is not started. So tiles, constants, alignment and new kernels
are whatever the package launches, and every Triton release specialises in its own way.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from barrier_memory import reused_barriers
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TRITON = tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:3])
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
HEADS, TOKENS = 2, 256  # of the calls that are recorded
USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")
ACCESS = re.compile(r"(?:ld|st)\.(?:global|shared)\S*")


@dataclass(frozen=True)
class Compiled:
    """One launched kernel. shared: bytes per block. registers: of 32 bits, per thread.

    spilled: bytes of stack per thread, that is of what did not fit the registers: the kernels use it for nothing else. accesses:
    the kinds of PTX instructions that read or write global or shared memory. reused: shared memory (begin, end) where a barrier of
    copies lies, and at another time something else.
    """

    name: str
    constants: tuple
    dtypes: tuple
    num_warps: int
    num_stages: int
    shared: int
    registers: int
    spilled: int
    accesses: frozenset
    reused: tuple

    def __str__(self):
        constants = " ".join(f"{key}={value}" for key, value in self.constants)
        return (
            f"{self.name} {constants} {' '.join(self.dtypes)} warps={self.num_warps} stages={self.num_stages}: "
            f"{self.shared / 1024:.1f} KB shared, {self.registers} registers, {self.spilled} bytes spilled"
        )


@dataclass(frozen=True)
class Launch:
    """What of a launch decides how a kernel is compiled for a card, but for strides and alignment."""

    name: str
    constants: tuple
    dtypes: tuple
    options: tuple


class AbsentCard:
    """As much of a Triton driver as compiling asks for; the device's number is its architecture."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)


class Recorder:
    """Compiles what is launched while it is installed; ``kernels`` are the distinct ones, in order of launch.

    While ``compiling`` is False it only takes down ``launches``, the set of what would be compiled. only: part of the names of
    what is compiled.
    """

    def __init__(self, monkeypatch, card, compiling=True, only=""):
        self.kernels, self.launches, self._seen, self.compiling = [], set(), set(), compiling
        # Triton 3.2 keeps the driver in .active, later releases behind a property of that name
        monkeypatch.setattr(driver, "_active" if "_active" in vars(driver) else "active", AbsentCard(card.arch))
        compile_only = JITFunction.run

        def launch(function, *args, grid, warmup, **options):
            self.launches.add(_launch(function, args, options))
            if not self.compiling or only not in function.fn.__name__:
                return None
            kernel = compile_only(function, *args, grid=grid, warmup=True, **options)
            if id(kernel) not in self._seen:
                self._seen.add(id(kernel))
                self.kernels.append(_described(kernel, _launch(function, args, options)))
            return kernel

        monkeypatch.setattr(JITFunction, "run", launch)


def _launch(function, args, options):
    names = [parameter.name for parameter in function.params]
    constants = {name: options[name] for name in names if name in options}
    others = {name: value for name, value in options.items() if name not in constants}
    dtypes = dict.fromkeys(str(arg.dtype).removeprefix("torch.") for arg in args if hasattr(arg, "dtype"))
    return Launch(function.fn.__name__, tuple(constants.items()), tuple(dtypes), tuple(sorted(others.items())))


def _described(kernel, launch):
    registers, spilled = _usage(kernel.asm["cubin"])
    metadata = kernel.metadata
    return Compiled(
        kernel.name,
        launch.constants,
        launch.dtypes,
        metadata.num_warps,
        metadata.num_stages,
        metadata.shared,
        registers,
        spilled,
        frozenset(ACCESS.findall(kernel.asm["ptx"])),
        reused_barriers(kernel),
    )


def _usage(cubin):
    """(registers, bytes of stack) per thread, as the binary asks the card for."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        said = subprocess.run([CUOBJDUMP, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, USAGE.search(said).groups())
    return registers, stack
