"""What a training achieved: output error of hard top-k attention against dense attention, before and after."""

from dataclasses import dataclass

# (router, ratio): before, what each half alone brings, after
VARIANTS = (
    ("untrained", "estimated"),
    ("untrained", "learned"),
    ("trained", "estimated"),
    ("trained", "learned"),
)
BEFORE, AFTER = VARIANTS[0], VARIANTS[-1]


@dataclass(frozen=True)
class LayerErrors:
    """Squared output errors of one layer per (router, ratio) variant and sparsity, and the dense output's energy."""

    sparsities: tuple[float, ...]
    squared: dict[tuple[str, str], tuple[float, ...]]
    energy: float

    def __add__(self, other):
        squared = {
            v: tuple(a + b for a, b in zip(self.squared[v], other.squared[v], strict=True)) for v in self.squared
        }
        return LayerErrors(self.sparsities, squared, self.energy + other.energy)

    def relative(self, variant, sparsity):
        """||out - dense|| / ||dense|| of a variant at one of the sparsities."""
        squared = self.squared[variant][self.sparsities.index(sparsity)]
        return (squared / self.energy) ** 0.5 if self.energy > 0 else 0.0


@dataclass(frozen=True)
class TrainingReport:
    """errors: per observed and evaluated layer. steps: optimisation steps per layer. notes: sentences for the user."""

    sparsities: tuple[float, ...]
    errors: dict[int, LayerErrors]
    steps: dict[int, int]
    notes: tuple[str, ...]

    def overall(self, variant, sparsity):
        """Root mean square over layers of the relative error: every layer counts alike."""
        squares = [e.relative(variant, sparsity) ** 2 for e in self.errors.values()]
        return (sum(squares) / len(squares)) ** 0.5

    def text(self):
        """The report as a plain-text table."""
        return "\n".join([*self._table(), *self._halves(), *self.notes])

    def _table(self):
        if not self.errors:
            return [f"{len(self.steps)} layers trained, none evaluated yet."]
        heads = [f"skips {_percent(s)}" for s in self.sparsities]
        lines = [
            "Attention output error against dense, ||out - dense|| / ||dense||, untrained / trained (lower is better)",
            "layer  steps  " + "  ".join(f"{head:>16}" for head in heads),
        ]
        for layer, errors in sorted(self.errors.items()):
            cells = [f"{errors.relative(BEFORE, s):.4f} / {errors.relative(AFTER, s):.4f}" for s in self.sparsities]
            lines.append(f"{layer:>5}  {self.steps.get(layer, 0):>5}  " + "  ".join(f"{c:>16}" for c in cells))
        cells = [f"{self.overall(BEFORE, s):.4f} / {self.overall(AFTER, s):.4f}" for s in self.sparsities]
        return [*lines, "  all         " + "  ".join(f"{c:>16}" for c in cells)]

    def _halves(self):
        """Which half of the training did it: one line per (router, ratio) variant, all layers."""
        if not self.errors:
            return []
        lines = ["", "all layers"]
        for variant in VARIANTS:
            cells = "  ".join(f"{self.overall(variant, s):>16.4f}" for s in self.sparsities)
            lines.append(f"  {variant[0]} router, {variant[1]} ratio:".ljust(38) + cells)
        return lines


def _percent(sparsity):
    return f"{100 * sparsity:.4g}%"
