"""Which calls take the sparse loop written for Hopper (hopper_loop.py, in Gluon) instead of Triton's."""

import functools

import torch
import triton

from ..support import interpreting

# The releases whose Gluon it was compiled with; names in it still change from one to the next.
GLUON_RELEASES = ((3, 6), (3, 7), (3, 8), (3, 9))
FORMATS = (("int8", "fp8"), ("16bit", "16bit"))
TMA_BYTES = 16  # strides and addresses of what it copies are multiples


@functools.cache
def _gluon_is_known():
    return tuple(int(part) for part in triton.__version__.split(".")[:2]) in GLUON_RELEASES


def takes_hopper_loop(card, qk, pv, q, k, v):
    """True where the loop in Gluon takes q, k, v (B, H, N, D) on a card of compute capability ``card``."""
    copied = (q,) if qk == "int8" else (q, k, v)
    return (
        card[0] == 9
        and (qk, pv) in FORMATS
        and q.shape[3] == 128
        and q.dtype in (torch.float16, torch.bfloat16)
        and all(_can_be_copied(x) for x in copied)
        and not interpreting()
        and _gluon_is_known()
    )


def _can_be_copied(x):
    """Whether TMA can: neighbours along D, every other stride a positive multiple of 16 bytes."""
    *outer, inner = x.stride()
    size = x.element_size()
    whole = all(stride > 0 and stride * size % TMA_BYTES == 0 for stride in outer)
    return whole and inner == 1 and x.data_ptr() % TMA_BYTES == 0
