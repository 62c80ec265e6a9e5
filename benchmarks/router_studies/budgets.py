"""Sparsity budgets: the same total of kept blocks, spread over layers or heads by where it lowers the error most."""

from dataclasses import replace

import torch

from miniature.captures import by_layer, model_shape
from sla2_kernels import RouterLayer
from sla2_training.trainer import RouterTrainer

from .training import evaluate, table, train

UNIT = 0.005  # kept shares are multiples of half a percent
MAX_UNITS = 60  # at least; twice the uniform budget where that is more


def spread(errors, units):
    """Units per row for a total of rows * units, each 1 or more, with the smallest sum of errors.

    errors: (rows, U), a row's squared error with 1 ... U units. Dynamic programming: exact for the given ladder.
    """
    rows, most = errors.shape
    total = rows * units
    best = torch.full((total + 1,), torch.inf, dtype=torch.float64)
    best[0] = 0
    choices = []
    for row in errors.double():
        candidates = torch.full((most, total + 1), torch.inf, dtype=torch.float64)
        for used in range(1, min(most, total) + 1):
            candidates[used - 1, used:] = best[: total + 1 - used] + row[used - 1]
        best, choice = candidates.min(dim=0)
        choices.append(choice + 1)
    chosen, left = [], int(best.argmin())
    for choice in reversed(choices):
        chosen.append(int(choice[left]))
        left -= chosen[-1]
    return chosen[::-1]


def _errors_by_unit(router, captures, options, most):
    """{layer: (U,) squared error, relative to the layer's energy} with 1 ... ``most`` units of kept blocks, estimated ratio."""
    ladder = tuple(1 - UNIT * units for units in range(1, most + 1))
    errors = {layer: [] for layer in by_layer(captures)}
    # a few sparsities at a time: every one of them adds to a step's memory
    for start in range(0, len(ladder), 10):
        part = ladder[start : start + 10]
        trainer = RouterTrainer("explored", *model_shape(captures), sparsities=part, options=options, resume=router)
        report = evaluate(trainer, captures, [("trained", "estimated")])
        for layer, found in report.errors.items():
            errors[layer] += found.squared["trained", "estimated"]
            energy = found.energy
            errors[layer, "energy"] = energy
    return {layer: torch.tensor(errors[layer]) / errors[layer, "energy"] for layer in by_layer(captures)}


def budget_study(train_captures, held_out, *, steps, sparsities, options):
    """Text: error at equal total cost, uniform and spread over layers and over heads; chosen on the training captures."""
    trainer, _ = train(train_captures, options, steps=steps, sparsities=sparsities)
    router = _without_ratios(trainer.router())
    most = min(round(1 / UNIT) - 1, max(MAX_UNITS, 2 * _units(min(sparsities))))
    rows, notes = [], []
    for label, split in (("layers", lambda c, r: (c, r)), ("heads", _heads_as_layers)):
        (fit, split_router), (test, _) = split(train_captures, router), split(held_out, router)
        share = 1.0 if label == "layers" else 1 / router.num_heads
        fitted, tested = (_errors_by_unit(split_router, c, options, most) for c in (fit, test))
        layers = sorted(fitted)
        weights = _energy_shares(fit, layers, router.num_heads) if label == "heads" else dict.fromkeys(layers, 1.0)
        chosen = {s: spread(torch.stack([fitted[i] * weights[i] for i in layers]), _units(s)) for s in sparsities}
        uniform = [_overall(tested, layers, [_units(s)] * len(layers), weights, share) for s in sparsities]
        spread_out = [_overall(tested, layers, chosen[s], weights, share) for s in sparsities]
        rows += [(f"uniform (by {label})", uniform), (f"spread over {label}", spread_out)]
        notes += [
            f"kept % per {label[:-1]} at {s}: {[round(100 * UNIT * u, 1) for u in chosen[s]]}" for s in sparsities
        ]
    return "\n".join([table("sparsity budget (estimated ratio)", map(str, sparsities), rows), *notes])


def _units(sparsity):
    return max(1, round((1 - sparsity) / UNIT))


def _overall(errors, layers, units, weights, share):
    squares = [float(errors[i][u - 1]) * weights[i] for i, u in zip(layers, units, strict=True)]
    return (sum(squares) / (len(layers) * share)) ** 0.5


def _without_ratios(router):
    layers = tuple(replace(layer, alpha_logits=None) for layer in router.layers)
    return replace(router, layers=layers)


def _heads_as_layers(captures, router):
    """Every head as a layer of its own: captures and router of a model with layers * heads layers of one head."""
    heads = router.num_heads
    split = [replace(c.heads(slice(h, h + 1)), layer=c.layer * heads + h) for c in captures for h in range(heads)]
    layers = []
    for layer in router.layers:
        for h in range(heads):
            projections = (p[h : h + 1] if p is not None and p.dim() == 3 else p for p in (layer.proj_q, layer.proj_k))
            layers.append(RouterLayer(*projections))
    return split, replace(router, layers=layers, num_heads=1)


def _energy_shares(captures, layers, heads):
    """Share of each head in its layer's output, by the energy of V: a head's relative error counts that much."""
    energy = {}
    for capture in captures:
        energy[capture.layer] = energy.get(capture.layer, 0.0) + float(capture.v.float().square().sum())
    totals = {}
    for layer in layers:
        totals[layer // heads] = totals.get(layer // heads, 0.0) + energy[layer]
    return {layer: energy[layer] / totals[layer // heads] for layer in layers}
