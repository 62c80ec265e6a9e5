"""What one block of threads may use on each generation of cards, and which Triton compiles for it."""

from dataclasses import dataclass

REGISTERS = 65536  # of one multiprocessor, on all of these


@dataclass(frozen=True)
class Card:
    """shared_kb: shared memory per block. oldest_triton: the first release whose compiler knows the card."""

    capability: tuple[int, int]
    models: str
    shared_kb: int
    oldest_triton: tuple[int, int, int] = (3, 2, 0)

    @property
    def arch(self):
        return self.capability[0] * 10 + self.capability[1]

    def __str__(self):
        return f"sm_{self.arch}"


CARDS = (
    Card((8, 0), "A100", 163),
    Card((8, 6), "RTX 30", 99),
    Card((8, 9), "RTX 40", 99),
    Card((9, 0), "H100", 227),
    Card((10, 0), "B200", 227, (3, 3, 0)),
    Card((12, 0), "RTX 50", 99, (3, 3, 1)),
)


def assert_fits(kernel, card, spill):
    """The card can start the kernel, at most ``spill`` bytes per thread did not fit its registers, and barriers keep their places.

    Kernels of float32 tensors alone must only start: each of their products is three TF32 ones, and few calls have them.
    """
    assert kernel.shared <= card.shared_kb * 1024, kernel
    assert kernel.num_warps * 32 * kernel.registers <= REGISTERS, kernel
    assert kernel.spilled <= spill or set(kernel.dtypes) <= {"float32", "int32"}, kernel
    assert not kernel.reused, f"{kernel}: barriers at {kernel.reused} share their memory"
