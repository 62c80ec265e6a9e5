"""The settings of SLA2 Apply Attention, checked once."""

import re
from dataclasses import dataclass

from ...sla2_kernels.references import REFERENCE_KEYS

PRECISIONS = ("auto", "int8", "fp8", "16bit")
RATIO_MODES = ("learned", "estimated", "fixed", "fitted")
MEASURING_RATIO_MODES = ("learned", "fitted")  # target_error takes fitted for learned
METHODS = ("automatic", "sla2", "top-k only")
AUTOMATIC = -1
FULL_WIDTH = str.maketrans("，、；：％", ",,;:%")  # as Chinese keyboards type them; web/js/schedule.js reads the same


@dataclass(frozen=True)
class AttentionSettings:
    """Settings of one patched model. Raises ValueError with one sentence where two of them contradict each other."""

    sparsity: float = 0.9
    precision: str = "auto"
    ratio_mode: str = "learned"
    fixed_ratio: float = 0.9
    start_percent: float = 0.0
    end_percent: float = 1.0
    dense_layers: frozenset[int] = frozenset()
    minimum_tokens: int = AUTOMATIC
    stop_on_unsupported: bool = False
    schedule: tuple = ()  # of schedule.Rule
    method: str = "automatic"
    target_error: float = 0.0  # attention error to choose the sparsity for; 0: sparsity counts
    reference_keys: str = REFERENCE_KEYS[0]  # of sla2_kernels.references
    plans_itself: bool = False  # preset automatic: sparsity and schedule are chosen as each run begins

    def __post_init__(self):
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be at least 0 and below 1, got {self.sparsity}.")
        if not 0 <= self.fixed_ratio <= 1:
            raise ValueError(f"fixed_ratio must lie between 0 and 1, got {self.fixed_ratio}.")
        check_percents(self.start_percent, self.end_percent)
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}.")
        check_ratio_mode(self.ratio_mode)
        check_method(self.method)
        if self.reference_keys not in REFERENCE_KEYS:
            raise ValueError(f"reference_keys must be one of {', '.join(REFERENCE_KEYS)}, got {self.reference_keys!r}.")
        check_target(self.target_error, self.ratio_mode, self.method)

    @property
    def sparsities(self):
        """Every sparsity that a call of a run may get, the ends of ramps among them; without those that a run chooses."""
        if self.plans_itself:
            return ()
        ruled = [sparsity for rule in self.schedule for sparsity in rule.sparsity or ()]
        return tuple(dict.fromkeys(ruled if self.target_error else [self.sparsity, *ruled]))

    @property
    def whole_run(self):
        return self.start_percent == 0 and self.end_percent == 1


def skips_keeps(sparsity):
    """0.97 -> "skips 97%, keeps 3%"; None, where nothing ran sparse -> "nothing skipped"."""
    if sparsity is None:
        return "nothing skipped"
    skipped = round(100 * sparsity, 1)
    return f"skips {skipped:g}%, keeps {round(100 - skipped, 1):g}%"


def check_method(method):
    """Raises ValueError with one sentence unless it is one of METHODS."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")


def check_ratio_mode(mode):
    """Raises ValueError with one sentence unless it is one of RATIO_MODES."""
    if mode not in RATIO_MODES:
        raise ValueError(f"ratio_mode must be one of {', '.join(RATIO_MODES)}, got {mode!r}.")


def check_target(target_error, ratio_mode, method):
    """Raises ValueError with one sentence unless calls of this ratio_mode and method can hold this target_error."""
    if not 0 <= target_error < 1:
        raise ValueError(f"target_error must be at least 0 (off) and below 1, got {target_error}.")
    if target_error and (ratio_mode not in MEASURING_RATIO_MODES or method == "top-k only"):
        raise ValueError(
            "target_error needs calls that measure their error: set ratio_mode to fitted or learned and method to "
            f"automatic or sla2 (now {ratio_mode} and {method}), or target_error to 0."
        )


def check_percents(start, end):
    """Raises ValueError with one sentence unless the range of steps is one."""
    if not 0 <= start < end <= 1:
        raise ValueError(f"start_percent must be below end_percent, both between 0 and 1, got {start} and {end}.")


def parse_layers(text, num_layers, where="dense_layers"):
    """ "0, 1, 28-29" -> {0, 1, 28, 29}; -1 is the last layer. Raises ValueError with one sentence. where: the input it stands in."""
    layers = set()
    for part, first, last in _layer_ranges(text, where):
        for layer in (first, last):
            if not -num_layers <= layer < num_layers:
                raise ValueError(f"{where} names layer {layer}, but this model has layers 0 to {num_layers - 1}.")
        first, last = first % num_layers, last % num_layers
        _check_order(part, first, last, where)
        layers.update(range(first, last + 1))
    return frozenset(layers)


def check_layers(text, where="dense_layers"):
    """Raises the sentence of parse_layers for a text that no model can have, whatever its number of layers."""
    for part, first, last in _layer_ranges(text, where):
        if (first < 0) == (last < 0):  # -1 may be any layer
            _check_order(part, first, last, where)


def _layer_ranges(text, where):
    """(part of the text, first, last layer as written) of each part."""
    for part in filter(None, (part.strip() for part in text.translate(FULL_WIDTH).split(","))):
        match = re.fullmatch(r"(-?[0-9]{1,6})(?:\s*-\s*(-?[0-9]{1,6}))?", part)
        if match is None:
            raise ValueError(
                f'{where} must name layers like "0, 1, 28-29", but {part[:100]!r} is no layer or range of layers.'
            )
        yield part, int(match[1]), int(match[2] or match[1])


def _check_order(part, first, last, where):
    if first > last:
        raise ValueError(f"{where} holds the range {part!r}, which ends before it starts.")


def layers_text(layers):
    """[0, 1, 2, 7] -> "0-2, 7", what parse_layers reads; layers rise."""
    ranges = []
    for layer in layers:
        if ranges and ranges[-1][1] == layer - 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in ranges)
