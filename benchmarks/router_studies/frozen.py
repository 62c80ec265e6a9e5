"""Captures with their query blocks drawn once: many trainings on the same tensors compute the dense rows a single time."""

import torch

from sla2_training.layer_tensors import LayerTensors


class FrozenLayer(LayerTensors):
    """A LayerTensors that always draws the same query blocks and keeps their sums.

    ``count`` blocks of ``T_n`` key blocks keep count * T_n * 128 * D floats per head: 35 MB per head at 8,400 tokens of
    head_dim 128 and 4 blocks.
    """

    def __init__(self, capture, count, seed):
        super().__init__(capture.layer, capture.q, capture.k, capture.v, "BHND", None)
        self.blocks = super().draw(count, torch.Generator().manual_seed(seed))
        self.kept = {}

    def draw(self, count, generator):
        return self.blocks[:, :, :count]

    def sums(self, blocks, chunk):
        place = tuple((part.start, part.stop) for part in chunk) + (blocks.shape[2],)
        if place not in self.kept:
            self.kept[place] = super().sums(blocks, chunk)
        return self.kept[place]


def freeze(captures, count):
    """A FrozenLayer for every capture, ``count`` query blocks of each, drawn by the capture's place in the list."""
    return [FrozenLayer(capture, count, seed) for seed, capture in enumerate(captures)]
