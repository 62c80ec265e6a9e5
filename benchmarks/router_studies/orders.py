"""Token order: raster as in the paper, 3-D tiles, or a Morton curve, for the same training."""

import torch

from sla2_training.report import AFTER, BEFORE

from .training import evaluate, table, train

# tiles of (t, h, w) tokens; 64 tokens are a key block, two neighbouring tiles a query block
TILES = {
    "tiles 1 x 8 x 8": (1, 8, 8),
    "tiles 4 x 4 x 4": (4, 4, 4),
    "tiles 2 x 4 x 8": (2, 4, 8),
    "tiles 8 x 2 x 4": (8, 2, 4),
}


def tile_order(grid, tile):
    """Raster positions of the tokens, tile after tile: int64 (N,). Tiles at the edges are smaller."""
    axes = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    key = torch.zeros(grid, dtype=torch.int64)
    for axis, size, length in zip(axes, tile, grid, strict=True):
        key = key * -(-length // size) + axis // size
    for axis, size in zip(axes, tile, strict=True):
        key = key * size + axis % size
    return key.flatten().argsort()


def morton_order(grid):
    """Raster positions of the tokens along a Morton (Z) curve: int64 (N,)."""
    axes = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    key = torch.zeros(grid, dtype=torch.int64)
    for bit in range(max(grid).bit_length()):
        for place, axis in enumerate(reversed(axes)):
            key |= (axis >> bit & 1) << (3 * bit + place)
    return key.flatten().argsort()


def order_study(train_captures, held_out, *, steps, sparsities, options):
    """Text: error before and after training, for every token order."""
    grid = held_out[0].grid
    orders = {"raster": None, "Morton": morton_order(grid)}
    orders.update((name, tile_order(grid, tile)) for name, tile in TILES.items())
    rows = []
    for name, order in orders.items():
        trainer, _ = train(_ordered(train_captures, order), options, steps=steps, sparsities=sparsities)
        report = evaluate(trainer, _ordered(held_out, order))
        for label, variant in (("untrained", BEFORE), ("trained", AFTER)):
            rows.append((f"{name}, {label}", [report.overall(variant, s) for s in sparsities]))
    return table("token order", map(str, sparsities), rows)


def _ordered(captures, order):
    if order is None:
        return captures
    order = order.to(captures[0].q.device)
    return [capture.permuted(order) for capture in captures]
