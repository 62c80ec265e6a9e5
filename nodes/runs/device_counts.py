"""Counts that stay on their device until the run ends: range of the ratios, error of exact rows, outputs that are not finite."""

import torch

from ..compat.recording import lasting_tensors

EMPTY = [float("inf"), float("-inf")]  # the range of no ratio at all


class DeviceCounts:
    """By layer and device. Filled in place, so that a call leaves no tensor behind. The caller holds a lock."""

    def __init__(self, layers):
        self._layers = layers
        self._bounds = {}  # by device: float32 (layers, 2), lowest and highest ratio
        self._bad = {}  # by device: int32 (layers,), outputs with NaN or infinity
        self._errors = {}  # by device: float32 (layers, 6), sums of call_errors(), and calls with rows to judge by
        self._measured = 0  # calls in them

    def prepare(self, device):
        """Allocates the memory for calls on ``device``, before a model call: inside one, nothing that is kept may be."""
        if device not in self._bounds:
            with lasting_tensors():
                self._bounds[device] = torch.tensor([EMPTY] * self._layers, device=device)
                self._bad[device] = torch.zeros(self._layers, dtype=torch.int32, device=device)
                self._errors[device] = torch.zeros(self._layers, 6, device=device)

    def add_ratio(self, layer, ratio):
        """ratio: the row ratios of a call, of any shape."""
        self.prepare(ratio.device)
        low, high = torch.aminmax(ratio)
        lowest, highest = self._bounds[ratio.device][layer].unbind()
        torch.minimum(lowest, low, out=lowest)
        torch.maximum(highest, high, out=highest)

    def add_bad(self, layer, bad):
        """bad: bool (), whether an output held NaN or infinity."""
        self.prepare(bad.device)
        self._bad[bad.device][layer].add_(bad)

    def add_errors(self, layer, errors):
        """errors: float32 (5,), fitted_attention.call_errors() of one call that fitted its ratio."""
        self.prepare(errors.device)
        sums = self._errors[errors.device][layer]
        sums[:5].add_(errors)
        sums[5].add_(errors[1] > 0)  # else all of its rows were left out
        self._measured += 1

    def fetch(self):
        """Brings the counts to the host, which waits for the devices."""
        for counts in (self._bounds, self._bad, self._errors):
            counts.update({device: tensor.cpu() for device, tensor in counts.items()})

    def ratio_range(self, layer):
        """(lowest, highest) ratio of a layer's calls, or None where there were none."""
        found = [bounds[layer].tolist() for bounds in self._bounds.values()]
        found = [bounds for bounds in found if bounds != EMPTY]
        if not found:
            return None
        # tensors' minimum, for Python's loses NaN
        lows, highs = torch.tensor(found).unbind(1)
        return lows.min().item(), highs.max().item()

    def bad_outputs(self, layer):
        """How many outputs of a layer held NaN or infinity."""
        return sum(int(bad[layer]) for bad in self._bad.values())

    def error(self, layer):
        """||output - exact|| / ||exact|| over the exact rows of a layer's calls, or None where there were none."""
        error, exact, *_ = self._totals(layer)
        return (error / exact) ** 0.5 if exact else None

    def rows_left_out(self, layer):
        """How many exact rows of a head, over a layer's calls, held NaN or infinity, or the output there did."""
        return round(self._totals(layer)[4])

    def _totals(self, layer):
        return sum((totals[layer].double() for totals in self._errors.values()), torch.zeros(6)).tolist()

    def relative_errors(self, with_fitted=False):
        """(sum of the squared relative errors, number) of the calls that were measured; waits for the devices.

        A call all of whose rows were left out has no part in it. with_fitted: over the rows that a ratio was fitted on, too,
        which are more and have a little less error; there such a call counts as one without error.
        """
        column = 3 if with_fitted else 2
        sums = [totals.cpu().double().sum(dim=0).tolist() for _, totals in sorted(self._errors.items(), key=str)]
        count = self._measured if with_fitted else round(sum(of_device[5] for of_device in sums))
        return sum(of_device[column] for of_device in sums), count

    def clear(self):
        self._bounds.clear()
        self._bad.clear()
        self._errors.clear()
        self._measured = 0
