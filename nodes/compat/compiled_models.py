"""torch.compile around a whole model: what decides per call must run per call.

ComfyUI compiles models without guards on transformer_options. Traced, our decisions of the first call would be those of all
calls (its step, its run record, its settings), so they stay outside; the layers between them are compiled all the same.
"""

import torch


def not_compiled(function, inside=False):
    """``function``, run by Python. inside: what it calls may be compiled."""
    return torch.compiler.disable(function, recursive=not inside)
