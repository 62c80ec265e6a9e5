"""ComfyUI's own sparse attention in the same comparison: which of the two is faster on this card, for this model."""

import logging
from dataclasses import dataclass

from ..compat.rival_attention import SETTING, with_rival
from ..page.text import plain
from .runs import NOT_MEASURED, Measured, relative_error

logger = logging.getLogger("sla2")


@dataclass(frozen=True)
class Rival:
    """ComfyUI's own sparse attention in the same place. measured: Measured, or None where it failed, with the reason."""

    setting: str
    measured: Measured | None
    failure: str = ""

    def rows(self, dense, sla2, device_name):
        """Rows of comparison_data(): its time and error, and which of the two is faster here."""
        name = "ComfyUI's own sparse attention"
        if self.measured is None:
            return [[name, f"{NOT_MEASURED}: {self.failure}"]]
        ours, theirs = sla2.step_s, self.measured.step_s
        first, second = ("SLA2", name) if ours <= theirs else (name, "SLA2")
        times = max(ours, theirs) / min(ours, theirs)
        return [
            [f"seconds per step, {name}", f"{theirs:.3f} ({self.setting})"],
            ["its latent error, relative to dense", relative_error(self.measured.latent, dense.latent)],
            [
                "which is faster",
                f"{first} is {times:.2f}x faster per step than {second}, on {device_name}, for this model and size",
            ],
        ]


def against_rival(dense_model, sampled):
    """Rival: ComfyUI's own sparse attention on the dense model; where it fails, what was measured is not lost."""
    try:
        return Rival(SETTING, sampled("with ComfyUI's own sparse attention", with_rival(dense_model)))
    # no kernels for this card, no memory, or a node of another release
    except (RuntimeError, ValueError, TypeError) as error:
        logger.exception("SLA2 Compare: ComfyUI's own sparse attention failed")
        return Rival(SETTING, None, plain(str(error)))
