"""Which calls take the sparse loop written for Hopper (hopper_loop.py, in Gluon) instead of Triton's, and why others do not."""

import functools

import torch
import triton

from ..router import Q_BLOCK
from ..support import interpreting, is_tested_triton

# The releases whose Gluon it was compiled with; names in it still change from one to the next.
GLUON_RELEASES = ((3, 6), (3, 7), (3, 8), (3, 9))
FORMATS = (("int8", "fp8"), ("16bit", "16bit"))
TMA_BYTES = 16  # strides and addresses of what it copies are multiples


@functools.cache
def gluon_is_known():
    """Whether the installed Triton is one of GLUON_RELEASES."""
    return is_tested_triton(GLUON_RELEASES)


def takes_hopper_loop(card, qk, pv, q, k, v, query_block=Q_BLOCK):
    """True where the loop in Gluon takes q, k, v (B, H, N, D) on a card of compute capability ``card``."""
    return why_not_hopper_loop(card, qk, pv, q, k, v, query_block) is None


def takes_hopper_walks(card, q, k, v, grad_out):
    """True where the backward's walks in Gluon (hopper_backward.py) take these tensors, (B, H, N, D) all."""
    return takes_hopper_loop(card, "16bit", "16bit", q, k, v) and _can_be_copied(grad_out)


def takes_hopper_linear(card, *tensors):
    """True where the linear branch's gradients in Gluon (hopper_linear.py) take these: q, k, v and the gradients."""
    return takes_hopper_walks(card, *tensors[:4]) and all(
        x.dtype == torch.bfloat16 and _can_be_copied(x) for x in tensors
    )


def why_not_hopper_loop(card, qk, pv, q, k, v, query_block=Q_BLOCK):
    """None where the loop in Gluon takes such a call, else one sentence why Triton's does; arguments as above."""
    if interpreting():
        return "Triton's interpreter runs no kernel in Gluon"
    if card[0] != 9:
        return (
            f"the Hopper loop is for cards of compute capability 9.0 (H100, H200), and this one has {card[0]}.{card[1]}"
        )
    if (qk, pv) not in FORMATS:
        return f"the Hopper loop multiplies in int8 and fp8, or all in 16 bit, not in {qk} and {pv}"
    if qk == "16bit" and query_block != Q_BLOCK:
        return f"the Hopper loop in 16 bit is for {Q_BLOCK} query tokens per selection, and this call has {query_block}"
    reason = why_no_loop_of(q.dtype, q.shape[3])
    if reason:
        return reason
    copied = {"q": q} if qk == "int8" else {"q": q, "k": k, "v": v}
    odd = [name for name, x in copied.items() if not _can_be_copied(x)]
    if odd:
        return f"the Hopper loop needs strides and addresses in multiples of {TMA_BYTES} bytes, unlike those of {' and '.join(odd)}"
    return None


def why_no_loop_of(dtype, head_dim):
    """None where tensors of this dtype and head_dim, and the installed Triton, do not stand in the loop's way, else one sentence."""
    if head_dim != 128:
        return f"the Hopper loop is for head_dim 128, and this call has {head_dim}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the Hopper loop takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if not gluon_is_known():
        first, last = (".".join(map(str, release)) for release in (GLUON_RELEASES[0], GLUON_RELEASES[-1]))
        return f"the Hopper loop was tested with Triton {first} to {last}, and this is Triton {triton.__version__}"
    return None


def _can_be_copied(x):
    """Whether TMA can: neighbours along D, every other stride a positive multiple of 16 bytes."""
    *outer, inner = x.stride()
    size = x.element_size()
    whole = all(stride > 0 and stride * size % TMA_BYTES == 0 for stride in outer)
    return whole and inner == 1 and x.data_ptr() % TMA_BYTES == 0
