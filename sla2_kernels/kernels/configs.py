"""Tile sizes, warps and pipeline stages per compute capability: a shipped table, no search on the user's machine."""

from dataclasses import dataclass, replace

from ..support import triton_version


class Launchable:
    """A configuration with num_warps, the warps of a program, and num_stages, those of its software pipeline."""

    @property
    def options(self):
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True)
class LoopConfig(Launchable):
    """The sparse loop: query rows per program. converts: INT8 scores become float32 one by one (see sparse_attention.py)."""

    tile_m: int
    num_warps: int
    num_stages: int
    converts: bool = False


@dataclass(frozen=True)
class LinearConfig(Launchable):
    """The linear branch: query rows per program."""

    tile_m: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class MassConfig(Launchable):
    """The unselected mass: query rows per program, key block means per step."""

    tile_m: int
    step: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class FitConfig(Launchable):
    """The sampled rows of a fitted ratio. parts: in how many parts V's 128 channels are taken. programs: at most, where there are
    fewer heads."""

    num_warps: int
    num_stages: int
    parts: int = 1
    programs: int = (
        528  # two for each of H200's 132 multiprocessors, twice; partial sums below 3% of Q where Q is large
    )


@dataclass(frozen=True)
class KeyBlockConfig(Launchable):
    """Attention by key block: query rows per program, and key blocks of one that writes sums. programs: at least, that look for
    the largest scores, where there are so many key blocks."""

    tile_m: int
    num_warps: int
    num_stages: int
    blocks: int = 4
    programs: int = 528


@dataclass(frozen=True)
class PackConfig(Launchable):
    """Packing a key block. parts: in how many parts V's channels are taken, one after the other. registers: at most, per
    thread, or None. ahead: so many programs before its own L2 is asked for a key block, 32 KB each; three run at a time on a multiprocessor."""

    parts: int
    num_warps: int
    registers: int | None = None
    ahead: int = 64
    num_stages: int = 3

    @property
    def options(self):
        return super().options | ({"maxnreg": self.registers} if self.registers else {})


@dataclass(frozen=True)
class ProductConfig(Launchable):
    """The masked sum: a tile_m x tile_n output tile, summed in steps of tile_k."""

    tile_m: int
    tile_n: int
    tile_k: int
    num_warps: int
    num_stages: int


def loop_formats(precision, capability):
    """(format of QK^T, format of PV) that ``precision`` means on that compute capability."""
    if precision == "16bit":
        return "16bit", "16bit"
    if precision == "fp8":
        return "fp8", "fp8"
    return "int8", "int8" if multiplies_by_mma_sync(capability) else "fp8"


def multiplies_by_mma_sync(capability):
    """Cards whose fastest matrix instructions are mma.sync: A100, RTX 30, 40 and 50. Hopper and B200 have others."""
    return capability[0] in (8, 12)


def _large_shared_memory(capability):
    # sm_80 has 163 KB per block, sm_90 and sm_100 227 KB; sm_86, sm_89 and sm_120 have 99 KB
    return capability[0] in (9, 10) or capability == (8, 0)


def _within(config, query_block):
    """The configuration, its tile no larger than a query block."""
    return replace(config, tile_m=min(config.tile_m, query_block))


def loop_config(capability, qk, pv, head_dim, element_size, query_block):
    """The sparse loop's configuration; element_size is that of q in bytes."""
    return _within(_loop_config(capability, qk, pv, head_dim, element_size), query_block)


def _loop_config(capability, qk, pv, head_dim, element_size):
    hopper = capability[0] == 9
    if qk == "16bit" and element_size == 4:
        if hopper:
            return LoopConfig(64, 4, 2)
        # more rows of float32 spill kilobytes per thread, or do not fit 99 KB with Triton 3.2
        return LoopConfig(64, 8, 1) if capability[0] == 10 else LoopConfig(2048 // head_dim, 4, 1)
    if pv == "int8":
        # 32 rows per warp: with 16 the warps read K and V from shared memory twice as often, and wait for that. Five stages: the
        # index of a key block is read first, which takes every second one, and with fewer K and V have one buffer alone, so
        # that each turn waits for what it has just asked for. Up to Triton 3.4 stages are those of K and V: five take 80 KB, of
        # which an RTX card has room for one program, three take 48
        return LoopConfig(128, 4, 5 if triton_version() >= (3, 5) else 3)
    if qk == "16bit" and hopper:
        return LoopConfig(64, 4, 3)
    if qk == "16bit":
        return LoopConfig(128, 8, 3 if _large_shared_memory(capability) else 2)
    # 4 warps with 128 x 128 sums spill in the loop, and issue more instructions per score than 8 on sm_80
    return LoopConfig(128, 8 if head_dim == 128 and not hopper else 4, 3, converts=hopper)


def linear_config(capability, element_size):
    """The linear branch's configuration; element_size is that of q in bytes."""
    if element_size == 2 or capability[0] == 9:
        return LinearConfig(64, 4, 1)
    return LinearConfig(64 if capability[0] == 10 else 32, 8, 1)


def mass_config(capability, element_size, query_block):
    """The unselected mass's configuration; element_size is that of q in bytes."""
    if element_size == 4:
        return MassConfig(32, 32, 4, 1)
    return _within(MassConfig(128, 64, 4, 1) if capability[0] == 9 else MassConfig(128, 64, 8, 2), query_block)


def pack_config(register_order):
    """The packing kernel's configuration. register_order: what the Hopper loop takes in FP8."""
    # 4 warps that take h_j in two parts get by with 168 registers a thread, so that three such programs run at a time
    return PackConfig(2, 4, registers=168, ahead=128) if register_order else PackConfig(1, 8)


def int8_pack_config(element_size, head_dim):
    """The configuration of int8_pack(); element_size is that of v in bytes."""
    if element_size == 4:
        return PackConfig(1, 8)
    if head_dim < 128:
        return PackConfig(1, 4, registers=96)  # five programs at a time
    # three programs at a time, or two: Triton 3.2 reshapes by way of shared memory, and with 80 registers spills 720 bytes
    return PackConfig(1, 8, registers=80 if triton_version() >= (3, 3) else 128)


def fit_config(capability, element_size):
    """The sampled rows' configuration; element_size is that of q in bytes."""
    if element_size == 4:
        return FitConfig(4, 1)
    if multiplies_by_mma_sync(capability):
        # halves of V are no wider than the tile is high, so that Triton gives each warp rows of its own; two programs at a time
        return FitConfig(4, 3 if _large_shared_memory(capability) else 2, parts=2)
    return FitConfig(4, 3)


# two programs a multiprocessor on Hopper; 128 rows do not fit the 99 KB of RTX cards
KEY_BLOCK_SUMS = KeyBlockConfig(64, 4, 2)


def product_config(capability, element_size):
    """The masked sum's configuration; element_size is that of its operands in bytes."""
    if element_size == 4:
        return ProductConfig(64, 64, 32, 4, 2)
    if capability[0] in (9, 10):
        return ProductConfig(128, 256, 64, 8, 3)
    if _large_shared_memory(capability):
        return ProductConfig(128, 128, 64, 8, 3)
    return ProductConfig(128, 128, 32, 4, 4)


INT8_PRODUCT = ProductConfig(128, 256, 64, 8, 2)  # the masked sum in INT8
