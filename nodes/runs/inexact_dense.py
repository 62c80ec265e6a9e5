"""Dense attention of another package that is wrong for some calls: which of the calls that SLA2 passes on are affected.

sageattention 1.0.6, which ``pip install sageattention`` gives, counts the padding of a ragged last block as keys.
"""

import functools
import importlib.metadata

from ..compat.override_arguments import by_name

WRONG_VERSION = "1.0.6"
# what that version takes; ComfyUI computes other calls with PyTorch. Masked calls are not counted: who gets them depends on
# the release of ComfyUI
HEAD_DIMS = (64, 96, 128)
KEYS_PER_BLOCK = 64


def ragged_key_count(args, kwargs):
    """Number of keys of an attention call as ComfyUI makes it, if sageattention takes it and they fill no whole blocks."""
    asked = by_name(args, kwargs)
    k, heads = asked.get("k"), asked.get("heads")
    if not getattr(k, "is_cuda", False) or not heads or asked.get("mask") is not None:
        return None
    head_dim = k.shape[-1] if asked.get("skip_reshape") else k.shape[-1] // heads
    if head_dim not in HEAD_DIMS or asked.get("low_precision_attention") is False:
        return None
    return k.shape[-2] if k.shape[-2] % KEYS_PER_BLOCK else None


def is_sage(name):
    """Whether a function of this name runs sageattention; SageAttention 3 is another package."""
    function = name.rpartition(".")[2].lower()
    return "sage" in function and "3" not in function


@functools.cache
def installed_sageattention():
    """Its version, or None."""
    try:
        return importlib.metadata.version("sageattention")
    except importlib.metadata.PackageNotFoundError:
        return None


def sage_warning(run):
    """None, or one sentence where calls of the run went to a sageattention that is wrong for their number of keys."""
    ragged = run.ragged_sage_calls
    if not ragged or installed_sageattention() != WRONG_VERSION:
        return None
    keys = f"{min(ragged)} to {max(ragged)}" if len(ragged) > 1 else min(ragged)
    return (
        f"{ragged.total()} calls over {keys} keys went to SageAttention, and sageattention {WRONG_VERSION} is wrong where "
        f"the keys are no multiple of {KEYS_PER_BLOCK}, the fewer the worse (21% off at 257): install version 2 or newer, "
        "or turn SageAttention off"
    )
