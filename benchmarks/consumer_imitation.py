"""Kernels in the instructions of a card that is not there, timed on an H100 or H200.

Triton writes PTX for sm_80, 86 or 89 (mma.sync, cp.async; no wgmma, no TMA), ptxas assembles it for the card at hand, and
SLA2 takes the tables of the card imitated. No more programs run per multiprocessor than there: the H100 has more shared
memory and room for more warps, so each kernel asks for as much shared memory as brings it down to that number.
"""

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

KB = 1024
RESERVED = KB  # shared memory that the driver keeps per program
REGISTERS = 65536  # of 32 bits per multiprocessor, on all of these cards
HOST_SHARED, HOST_MOST = 228 * KB, 227 * KB  # H100: per multiprocessor, per program
MATRIX = re.compile(r"\b([HIQ]MMA|HGMMA|IGMMA|QGMMA)(\.[\w.]+)?")


@dataclass(frozen=True)
class Multiprocessor:
    """What one multiprocessor holds at a time. shared: bytes."""

    capability: tuple[int, int]
    models: str
    warps: int
    programs: int
    shared: int

    @property
    def arch(self):
        return 10 * self.capability[0] + self.capability[1]

    def resident(self, warps, registers, shared):
        """How many programs of so many warps, registers per thread and bytes of shared memory run at a time; 0: none can."""
        # registers are handed out to a warp in units of 256
        per_warp = -(-registers * 32 // 256) * 256
        return min(
            self.programs, self.warps // warps, REGISTERS // (per_warp * warps), self.shared // (shared + RESERVED)
        )


CARDS = {
    card.arch: card
    for card in (
        Multiprocessor((8, 0), "A100", 64, 32, 164 * KB),
        Multiprocessor((8, 6), "RTX 30", 48, 16, 100 * KB),
        Multiprocessor((8, 9), "RTX 40, L40", 48, 24, 100 * KB),
        Multiprocessor((12, 0), "RTX 50", 48, 24, 100 * KB),
    )
}
ASSEMBLED = tuple(arch for arch in CARDS if arch < 90)  # whose PTX ptxas takes for an H100


def padded_shared(card, warps, registers, shared):
    """Bytes of shared memory to ask an H100 for, so that no more programs run there than on ``card``.

    Raises ValueError for a kernel that ``card`` cannot start.
    """
    wanted = card.resident(warps, registers, shared)
    if wanted == 0:
        raise ValueError(
            f"sm_{card.arch} cannot start a kernel of {warps} warps, {registers} registers, {shared} bytes."
        )
    least = HOST_SHARED // (wanted + 1) - RESERVED + 1  # of which wanted + 1 programs do not fit
    return min(max(shared, least), HOST_MOST)


def tool(name):
    """Path of one of the CUDA programs that Triton brings along."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def _run(name, binary, *options):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        return subprocess.run([tool(name), *options, path], capture_output=True, text=True, check=True).stdout


def resources(cubin):
    """(registers, bytes of stack) per thread."""
    said = _run("cuobjdump", cubin, "-res-usage")
    return tuple(map(int, re.search(r"REG:(\d+) STACK:(\d+)", said).groups()))


def matrix_instructions(cubin):
    """{matrix instruction: how often it stands in the code}, such as {"IMMA.16832.S8.S8": 64}."""
    found = Counter()
    for name, kind in MATRIX.findall(_run("cuobjdump", cubin, "-sass")):
        # .SAT and register hints aside
        found[name + re.sub(r"\.(SAT|SP|ROW|COL)\b", "", kind)] += 1
    return dict(found)


def assembled(ptx, arch):
    """The cubin that ptxas makes of this PTX for sm_``arch``."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx, encoding="utf-8")
        subprocess.run([tool("ptxas"), f"-arch=sm_{arch}", source, "-o", target], capture_output=True, check=True)
        return target.read_bytes()


@dataclass(frozen=True)
class Kernel:
    """One kernel as it was timed. shared, padded: bytes asked for by the card imitated, and of the H100."""

    name: str
    warps: int
    registers: int
    stack: int
    shared: int
    padded: int
    programs: int  # per multiprocessor
    instructions: dict  # matrix instructions as assembled for the H100
    own_instructions: dict  # and for the card itself

    @property
    def faithful(self):
        """Whether the H100 ran the matrix instructions that the card itself would."""
        return self.instructions == self.own_instructions


class Imitation:
    """Makes this process compile for ``card``, a Multiprocessor, from begin() on; ``kernels`` lists what was compiled.

    For the whole process, which should have a TRITON_CACHE_DIR of its own: what is cached does not say what it was padded to.
    """

    def __init__(self, card):
        self.card, self.kernels = card, []

    def begin(self):
        import triton
        from triton.backends.nvidia import compiler

        from sla2_kernels import support

        triton.knobs.runtime.override_arch = f"sm{self.card.arch}"
        support._cuda_capability = lambda index: self.card.capability
        write, assemble, imitation = compiler.CUDABackend.make_ptx, compiler.CUDABackend.make_cubin, self

        def make_ptx(backend, source, metadata, options, capability):
            return write(backend, source, metadata, options, imitation.card.arch)

        def make_cubin(backend, source, metadata, options, capability):
            cubin = assemble(backend, source, metadata, options, 90)
            imitation._take(source, cubin, metadata)
            return cubin

        compiler.CUDABackend.make_ptx, compiler.CUDABackend.make_cubin = make_ptx, make_cubin

    def _take(self, ptx, cubin, metadata):
        own = assembled(ptx, self.card.arch)
        registers, _ = resources(own)
        shared, warps = metadata["shared"], metadata["num_warps"]
        metadata["shared"] = padded_shared(self.card, warps, registers, shared)
        here, stack = resources(cubin)
        self.kernels.append(
            Kernel(
                metadata["name"], warps, here, stack, shared, metadata["shared"], self.card.resident(warps, registers, shared),
                matrix_instructions(cubin), matrix_instructions(own),
            )
        )  # fmt: skip


def imitate(arch):
    """An Imitation of sm_``arch``, of ASSEMBLED, which has begun in this process, with a Triton cache of its own."""
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()
    imitation = Imitation(CARDS[arch])
    imitation.begin()
    return imitation
