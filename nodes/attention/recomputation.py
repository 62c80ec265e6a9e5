"""Calls that a backward pass makes once more, because gradient checkpointing kept none of their tensors.

Such a call must run as it did the first time, or it would save other tensors for autograd. It is not a new call, and is not
counted.
"""

import threading
from collections import Counter, defaultdict

import torch


def backward_pass():
    """The number of the backward pass that runs in this thread, or None."""
    number = torch._C._current_graph_task_id()  # what torch.utils.checkpoint itself goes by
    return None if number == -1 else number


class Decisions:
    """How the calls of each layer went in one model call. Recomputation asks for them in the same order."""

    def __init__(self):
        self._made_in = backward_pass()
        self._taken = defaultdict(list)
        self._asked = Counter()
        self._lock = threading.Lock()

    @property
    def repeated(self):
        """Whether the model call is over, and parts of it are recomputed now."""
        return backward_pass() not in (None, self._made_in)

    def take(self, layer, decision):
        """Stores the decision of a layer's call."""
        with self._lock:
            self._taken[layer].append(decision)

    def again(self, layer):
        """The decision of the call that is recomputed now; with nested checkpoints that happens more than once."""
        with self._lock:
            key, taken = (backward_pass(), layer), self._taken[layer]
            self._asked[key] += 1
            return taken[(self._asked[key] - 1) % len(taken)]
