"""Which sparse loop each call of the operator took, and why not a faster one: recorded by watch_loops() in the same thread."""

import threading
from contextlib import contextmanager
from typing import NamedTuple

import torch

HOPPER, TRITON, TORCH = "Hopper's loop (Gluon)", "Triton's loop", "PyTorch's loop, block by block"


class Loop(NamedTuple):
    """name: HOPPER, TRITON or TORCH. why_not_faster: None for the fastest there is, else one sentence."""

    name: str
    why_not_faster: str | None = None


# kept on the torch namespace, which exists once per process even if several copies of this package are imported
_watching = vars(torch.ops.sla2).setdefault("watching", threading.local())


@contextmanager
def watch_loops():
    """Yields a list to which every call of the operator in this thread adds its Loop until the block ends."""
    outer, _watching.seen = getattr(_watching, "seen", None), []
    try:
        yield _watching.seen
    finally:
        _watching.seen = outer


def took_loop(name, why_not_faster=None):
    seen = getattr(_watching, "seen", None)
    if seen is not None:
        seen.append(Loop(name, why_not_faster))
