"""What the kernels in Gluon share."""

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# renamed between Triton 3.6 and 3.9
load_async = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
store_async = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret


@gluon.jit
def new_barriers(STAGES: gl.constexpr, COUNT: gl.constexpr):
    """One barrier per stage of a ring, each passed at the COUNT-th arrival."""
    barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(barriers.index(stage), count=COUNT)
    return barriers


@gluon.jit
def stage_of(barriers, step):
    """The stage of a ring that takes step ``step``."""
    return step % barriers.shape[0]


@gluon.jit
def wait_full(full, step):
    """Waits until the producer has filled the stage of step ``step``; returns the stage."""
    stage = stage_of(full, step)
    # a barrier's phase flips each time the ring comes round
    mbarrier.wait(full.index(stage), (step // full.shape[0]) & 1)
    return stage


@gluon.jit
def wait_empty(empty, step):
    """Waits until the consumers have left the stage that step ``step`` fills: at once in the first round; returns the stage."""
    stage = stage_of(empty, step)
    mbarrier.wait(empty.index(stage), ((step // empty.shape[0]) & 1) ^ 1)
    return stage


@gluon.jit
def leave(empty, step):
    """Tells the producer that this consumer no longer reads the stage of step ``step``."""
    mbarrier.arrive(empty.index(stage_of(empty, step)), count=1)


@gluon.jit
def keep(operand, BITS: gl.constexpr):
    """Keeps registers that a matrix instruction under way still reads: called after the wait for it. BITS: of an element."""
    if BITS == 8:
        gl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [operand.to(gl.int8, bitcast=True)], dtype=gl.int8, is_pure=False, pack=4
        )
    else:
        gl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [operand.to(gl.int16, bitcast=True)], dtype=gl.int16, is_pure=False, pack=2
        )


@functools.cache
def programs(device):
    """One per multiprocessor; 1 for tensors on the CPU, whose launch is only compiled."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
