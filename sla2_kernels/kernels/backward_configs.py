"""Tile sizes of the backward kernels per compute capability, like configs.py for the forward pass."""

from dataclasses import dataclass

from ..router import Q_BLOCK
from .configs import Launchable


@dataclass(frozen=True)
class TileConfig(Launchable):
    """rows: query rows of a tile; keys: key rows of a tile (at most one key block)."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class LinearConfig(Launchable):
    """rows, keys: as in TileConfig. cols: columns of H at a time."""

    rows: int
    keys: int
    cols: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class BackwardConfig:
    """queries, keys: the two walks over selected pairs. linear: the kernels of the linear branch."""

    queries: TileConfig
    keys: TileConfig
    linear: LinearConfig


def backward_config(capability, element_size, workspace_size, query_block=Q_BLOCK):
    """Configurations of all backward kernels; the sizes are those of an element of q and of the workspace, in bytes.

    The small tiles keep every kernel within the 99 KB of shared memory that sm_86, sm_89 and sm_120 have.
    """
    if element_size == 4:
        walks = (TileConfig(32, 32, 4, 1),) * 2
    elif capability[0] == 9:
        # one warpgroup and 64 rows a program, so that two programs fit a multiprocessor: one multiplies, one takes exponentials
        walks = TileConfig(64, 64, 4, 2), TileConfig(64, 64, 4, 2)
    elif capability[0] == 10 and query_block == Q_BLOCK:
        walks = TileConfig(128, 64, 8, 2), TileConfig(64, 64, 4, 2)
    elif capability[0] == 10:
        walks = TileConfig(64, 64, 4, 2), TileConfig(64, 64, 4, 2)
    elif query_block == Q_BLOCK:
        # with no fewer rows than channels Triton gives every warp whole rows, so that row sums and P stay within a warp
        walks = TileConfig(128, 32, 8, 3), TileConfig(32, 64, 4, 2)
    else:
        walks = TileConfig(64, 64, 8, 2), TileConfig(32, 64, 4, 2)
    linear = LinearConfig(32, 32, 32, 4, 1)
    if workspace_size == 2:
        linear = LinearConfig(64, 64, 64, 8 if capability[0] in (9, 10) else 4, 2)
    return BackwardConfig(*walks, linear)
