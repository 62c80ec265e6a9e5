"""The validation table of stage 2."""

import json
from dataclasses import asdict, dataclass, field

from .lora import replace_file


@dataclass(frozen=True)
class Validation:
    """At one step, over the same videos, noise and levels each time: flow, the mean squared error to the true velocity;
    distance, that to the dense model's velocity."""

    step: int
    flow: float
    distance: float


@dataclass
class Report:
    """ways: names of what steps train in turns, ``loss`` first. dense_flow: the flow-matching loss of the model run dense.
    losses: training loss per step."""

    loss: str
    sparsity: float
    ways: list[str] = field(default_factory=list)
    dense_flow: float | None = None
    validations: list[Validation] = field(default_factory=list)
    losses: dict[int, float] = field(default_factory=dict)

    def table(self):
        """Markdown: one row per validation, the dense model last."""
        lines = [
            f"| step | training loss ({self.loss}) | flow-matching loss | distance to dense velocity |",
            "|---|---|---|---|",
        ]
        for row in self.validations:
            turns = len(self.ways) or 1
            steps = range(max(0, row.step - 20 * turns), row.step)
            recent = [self.losses[step] for step in steps if step % turns == 0 and step in self.losses]
            mean = f"{sum(recent) / len(recent):.5f}" if recent else ""
            lines.append(f"| {row.step} | {mean} | {row.flow:.5f} | {row.distance:.6f} |")
        if self.dense_flow is not None:
            lines.append(f"| dense | | {self.dense_flow:.5f} | 0 |")
        return "\n".join(lines)

    def closed(self):
        """Share of the flow-matching gap between the first validation and dense that the last one closed; None without a gap."""
        if self.dense_flow is None or len(self.validations) < 2:
            return None
        gap = self.validations[0].flow - self.dense_flow
        return (self.validations[0].flow - self.validations[-1].flow) / gap if gap > 0 else None

    def write(self, path):
        replace_file(path, self._dump)

    def _dump(self, path):
        with open(path, "w", encoding="utf-8") as file:
            json.dump(asdict(self), file, indent=1)
