"""What the kernels in Gluon for Hopper share."""

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

# renamed between Triton 3.6 and 3.9
load_async = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret


@gluon.jit
def keep(operand, LOW: gl.constexpr):
    """Holds the registers that a matrix instruction under way reads until here: after the wait for it. LOW: 8 bit, not 16."""
    if LOW:
        gl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [operand.to(gl.int8, bitcast=True)], dtype=gl.int8, is_pure=False, pack=4
        )
    else:
        gl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [operand.to(gl.int16, bitcast=True)], dtype=gl.int16, is_pure=False, pack=2
        )


@functools.cache
def programs(device):
    """One per multiprocessor; 1 for tensors that are on no card, whose launch is only compiled."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
