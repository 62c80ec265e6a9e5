"""Tensors that outlive the call that makes them. ComfyUI 0.35 and newer records the allocations of some models' calls and of
each of their blocks, to replay them: what is taken inside and kept afterwards breaks the record.
"""

import contextlib
import sys

import torch


@contextlib.contextmanager
def lasting_tensors():
    """Tensors made in here may be kept: outside the recording, without autograd, and no inference tensors."""
    with _pause(), torch.inference_mode(False), torch.no_grad():
        yield


def _pause():
    """ComfyUI's pause of its recording, where it has one. It does nothing where none is under way."""
    pause = getattr(sys.modules.get("comfy.model_prefetch"), "pause_malloc_graph", None)
    return contextlib.nullcontext() if pause is None else pause()
