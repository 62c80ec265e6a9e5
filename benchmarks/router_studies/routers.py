"""Which router and which way to train it: per-head or shared, temperature, normalised scores, learning rate, token order."""

from dataclasses import replace

import torch

from miniature.captures import by_layer
from sla2_training.report import BEFORE
from sla2_training.trainer import TrainerOptions

from .training import evaluate, layer_tensors, table, train

# name -> (changed options, annealed temperature)
VARIANTS = {
    "per head (default)": ({}, None),
    "shared by the heads": ({"per_head": False}, None),
    "tau 0.03": ({"tau": 0.03}, None),
    "tau 0.3": ({"tau": 0.3}, None),
    "tau 1": ({"tau": 1.0}, None),
    "tau 1 -> 0.1": ({}, (1.0, 0.1)),
    "tau 0.3 -> 0.03": ({}, (0.3, 0.03)),
    "normalised, tau 0.1": ({"normalise_scores": True}, None),
    "normalised, tau 0.3": ({"normalise_scores": True, "tau": 0.3}, None),
    "learning rate / 3": ({"learning_rate": TrainerOptions.learning_rate / 3}, None),
    "learning rate * 3": ({"learning_rate": TrainerOptions.learning_rate * 3}, None),
}


def router_study(train_captures, held_out, *, steps, sparsities, options):
    """Text: error of every variant with the estimated ratio, which shows the selection alone, and seconds per step."""
    rows = []
    for name, (changes, tau) in VARIANTS.items():
        trainer, seconds = train(
            train_captures, replace(options, **changes), steps=steps, sparsities=sparsities, tau=tau
        )
        report = evaluate(trainer, held_out, [BEFORE, ("trained", "estimated")])
        if not rows:
            rows.append(("untrained", [report.overall(BEFORE, s) for s in sparsities] + [0.0]))
        errors = [report.overall(("trained", "estimated"), s) for s in sparsities]
        rows.append((name, errors + [seconds]))
    rows.append(("blocks of most true mass", oracle_errors(trainer, held_out) + [0.0]))
    return table("selection (estimated ratio)", [*map(str, sparsities), "s/step"], rows)


@torch.no_grad()
def oracle_errors(trainer, captures):
    """Errors with the blocks that hold the most attention mass of each query block: what a perfect router would find."""
    trainer.generator.manual_seed(1)
    relative = []
    for of_layer in by_layer(captures).values():
        squared, energy = 0.0, 0.0
        for capture in of_layer:
            tensors = layer_tensors(capture)
            blocks = tensors.draw(trainer.query_blocks, trainer.generator)
            for chunk in tensors.chunks(blocks, trainer.memory_bytes):
                sums = tensors.sums(blocks, chunk)
                shares = sums.mass / sums.mass.sum(dim=2, keepdim=True)
                scores = (shares * sums.valid[:, :, None]).sum(dim=-1)
                mask = trainer.hard_masks(scores[None])
                out = sums.output(mask, sums.estimated_ratio(mask))
                squared = squared + sums.squared_error(out).sum(dim=(0, 1))
                energy = energy + sums.energy().sum()
        relative.append(squared / energy)
    return torch.stack(relative).mean(dim=0).sqrt().tolist()
