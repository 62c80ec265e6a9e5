"""A schedule for SLA2 Apply Attention from the errors that a router's training measured."""

from decimal import Decimal
from statistics import median

from ...sla2_training.report import AFTER
from ..settings.values import layers_text


def suggested_schedule(report):
    """Text of one rule per sparsity, such as "layers 0-3, 7: 0.9; layers 4-6: 0.97"; "" where no layer was measured.

    A layer gets the highest trained sparsity whose error after training is at most the tolerance, else the lowest one.
    The tolerance is the median over the layers of the error at the middle trained sparsity (the lower of two in the
    middle), so that about half of the layers skip at least as much as that. report: TrainingReport.
    """
    if not report.errors:
        return ""
    sparsities = sorted(report.sparsities)
    middle = sparsities[(len(sparsities) - 1) // 2]
    tolerance = median(errors.relative(AFTER, middle) for errors in report.errors.values())
    layers = {sparsity: [] for sparsity in sparsities}
    for layer, errors in sorted(report.errors.items()):
        fitting = [s for s in sparsities if errors.relative(AFTER, s) <= tolerance]
        layers[max(fitting, default=sparsities[0])].append(layer)
    return "; ".join(f"layers {layers_text(own)}: {_decimal(sparsity)}" for sparsity, own in layers.items() if own)


def _decimal(sparsity):
    return format(Decimal(str(sparsity)), "f")  # a schedule has no exponents
