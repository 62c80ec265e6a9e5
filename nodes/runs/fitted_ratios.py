"""Mixing ratios that are fitted while a run samples: which calls fit one, and what the calls between them take.

A fitting call computes some of its own query rows exactly (sla2_kernels/fitted_attention.py). Attention changes with the noise
level: in a short run a ratio of the step before gains nothing, in a long one it lasts for a few steps.
"""

import threading
from collections import Counter
from dataclasses import dataclass

import torch

from ..compat.recording import lasting_tensors

SHORT_RUN = 8  # steps, at most, of a run whose every call fits
EVERY = 4  # calls of one kind, in longer runs
DRAWS = 1 << 20  # more than a model has layers: numbers of draws are apart by layer and by call


@dataclass
class KeptRatio:
    """What the calls of one kind share. ratio: float32 (H,), filled in place, so that a call leaves no tensor behind."""

    ratio: torch.Tensor
    calls: int = 0
    filled: bool = False

    @torch.no_grad()
    def keep(self, ratio):
        """ratio: float32 (B, H), of a call that fitted it."""
        torch.mean(ratio, dim=0, out=self.ratio)
        self.filled = True


@dataclass(frozen=True)
class CallRatio:
    """How one call gets its ratio: fitted on the rows of draw ``number``, or kept.ratio where that is None."""

    number: int | None
    kept: KeptRatio | None = None  # None where the calls to come fit their own


class FittedRatios:
    """Ratios of one run by kind of call: layer, device, sparsity and halves of guidance. Used by several threads (MultiGPU)."""

    def __init__(self):
        self._kept = {}
        self._draws = Counter()
        self._lock = threading.Lock()

    def prepare(self, kind, heads):
        """KeptRatio of a kind of calls, allocated before a model call: inside one, nothing that is kept may be.

        kind: (layer, device, sparsity, halves of guidance).
        """
        with self._lock:
            if kind not in self._kept:
                with lasting_tensors():
                    self._kept[kind] = KeptRatio(torch.zeros(heads, device=kind[1]))
            return self._kept[kind]

    def of_call(self, kind, heads, steps, measures=None):
        """CallRatio of the next call of a kind. steps: of the run; None, if unknown, fits every call.

        measures: whether an ErrorTarget wants this call's error, which a call that fits can measure; None without one. The
        draw depends on the layer and on how many calls of its half of guidance came before: a prompt repeated has the same
        bits, on one device or two. For an ErrorTarget the halves, whose errors in a row are alike, measure different rows.
        """
        kept, (layer, device, _, halves) = self.prepare(kind, heads), kind
        with self._lock:
            number, kept.calls = kept.calls, kept.calls + 1
            draw = self._draws[layer, device, halves]
            self._draws[layer, device, halves] += 1
        is_short = steps is None or steps <= SHORT_RUN
        if measures is None:
            measures = is_short or number % EVERY == 0
        else:
            draw = 2 * draw + (halves == (1,))
        if not measures and kept.filled:
            return CallRatio(None, kept)
        return CallRatio(draw * DRAWS + layer, None if is_short else kept)

    def clear(self):
        with self._lock:
            self._kept.clear()
