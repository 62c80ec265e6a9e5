"""How many query tokens share a selection where no router file says it."""

import torch
from torch._subclasses.fake_tensor import FakeTensor

from . import support
from .router import Q_BLOCK


def default_query_block(q, precision):
    """Query tokens per selection without a trained router: 64 where that has less error in the same time, else 128.

    That is where the INT8 loop for Hopper runs (docs/ROUTER_DECISIONS.md, "Query tokens per selection"). q: (..., D), in
    either layout. precision: as resolve_precision() returns. While torch.compile traces, and for a FakeTensor, dtype and shape
    decide, so that a compiled call and a plain one can differ for strides or addresses that TMA does not take.
    """
    on_hopper = q.device.type == "cuda" and support.capability(q.device)[0] == 9
    if not on_hopper or precision != "int8" or support.why_no_triton() is not None:
        return Q_BLOCK
    from .kernels.hopper import takes_hopper_loop, why_no_loop_of  # needs Triton

    # neither has an address
    if torch.compiler.is_compiling() or isinstance(q, FakeTensor):
        return 64 if why_no_loop_of(q.dtype, q.shape[-1]) is None else Q_BLOCK
    return 64 if takes_hopper_loop(support.capability(q.device), "int8", "fp8", q, q, q, 64) else Q_BLOCK
