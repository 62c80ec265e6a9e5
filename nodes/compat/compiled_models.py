"""torch.compile around a whole model: what decides per call must run per call.

ComfyUI compiles models without guards on transformer_options. Traced, our decisions of the first call would be those of all
calls (its step, its run record, its settings), so they stay outside; the layers between them are compiled all the same.
"""

import contextlib

import torch


def not_compiled(function, inside=False):
    """``function``, run by Python. inside: what it calls may be compiled."""
    return torch.compiler.disable(function, recursive=not inside)


@contextlib.contextmanager
def graphs_of_its_own():
    """What is compiled inside is not taken outside, nor the other way round.

        torch.compile does not look at a module's hooks, which mark our layers: a graph from a run without them would be taken,
        and no mark would run. It does look at autocast's state, and whether autocast keeps its casts says nothing while it is off
    (seen with PyTorch 2.7 to 2.13; 2.6 does not look at this part of it).
    """
    was = torch.is_autocast_cache_enabled()
    if not any(torch.is_autocast_enabled(device) for device in ("cuda", "cpu")):
        torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(was)
