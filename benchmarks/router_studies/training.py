"""Train on captures, evaluate on others."""

import time

import torch

from miniature.captures import by_layer, model_shape
from sla2_training.layer_tensors import LayerTensors
from sla2_training.report import VARIANTS
from sla2_training.trainer import RouterTrainer


def layer_tensors(capture):
    """The LayerTensors of a Capture; a FrozenLayer is one already."""
    if isinstance(capture, LayerTensors):
        return capture
    return LayerTensors(capture.layer, capture.q, capture.k, capture.v, "BHND", None)


def train(captures, options, *, steps, sparsities, tau=None):
    """A RouterTrainer after ``steps`` steps per layer on shuffled captures, and its seconds per step and layer.

    tau: (first, last) anneals SoftTop-k's temperature geometrically; None keeps the options'.
    """
    trainer = RouterTrainer("explored", *model_shape(captures), sparsities=sparsities, options=options)
    layers, shuffle = by_layer(captures), torch.Generator().manual_seed(0)
    layers = {
        layer: [of_layer[i] for i in torch.randperm(len(of_layer), generator=shuffle)]
        for layer, of_layer in layers.items()
    }
    start = time.perf_counter()
    for step in range(steps):
        if tau is not None:
            trainer.tau = tau[0] * (tau[1] / tau[0]) ** (step / max(1, steps - 1))
        for of_layer in layers.values():
            capture = of_layer[step % len(of_layer)]
            trainer.observe_tensors(layer_tensors(capture))
    return trainer, (time.perf_counter() - start) / max(1, steps * len(layers))


def evaluate(trainer, captures, variants=VARIANTS):
    """TrainingReport of the trainer on the captures alone; the same query blocks are drawn every time."""
    trainer.errors = {}
    trainer.generator.manual_seed(1)
    for capture in captures:
        trainer.evaluate_tensors(layer_tensors(capture), variants)
    return trainer.report()


def table(title, columns, rows):
    """A plain-text table; rows are (name, values)."""
    width = max([len(name) for name, _ in rows] + [len(title)])
    lines = [title.ljust(width) + "".join(f"{column:>12}" for column in columns)]
    for name, values in rows:
        lines.append(name.ljust(width) + "".join(f"{value:>12.4f}" for value in values))
    return "\n".join(lines)
