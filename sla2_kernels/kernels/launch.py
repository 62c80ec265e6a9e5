"""Launching a compiled kernel again without Triton's front end, which takes longer than the smaller kernels run.

The front end finds out, argument by argument, which compiled kernel a call needs. A plan remembers the answer for one
signature of the caller's tensors: dtypes, shapes, strides and 16-byte alignment, which is all that it depends on. The
tensors in between come from torch's allocator and are always aligned.
"""

import torch
import triton
from triton.runtime.driver import driver

MOST_PLANS = 256
# Where a compiled kernel takes every argument, constants included; earlier releases go through the front end each time.
DIRECT = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)

_plans = {}


def plan_for(*tensors):
    """The plan of calls with such tensors (None allowed) on the current device: a dict that launch() fills.

    None where nothing is compiled: on the CPU.
    """
    if not (DIRECT and tensors[0].is_cuda):
        return None
    key = torch.cuda.current_device(), *map(_signature, tensors)
    if key not in _plans and len(_plans) >= MOST_PLANS:
        _plans.clear()
    return _plans.setdefault(key, {})


def _signature(tensor):
    if tensor is None:
        return None
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() % 16 == 0


def launch(plan, kernel, grid, *args, options, **constants):
    """kernel[grid](*args, **constants, **options).

    plan: of plan_for(), or None to go through Triton's front end. options: num_warps and the like, all of them implied
    by the constants and the plan's signature.
    """
    key = kernel, *constants.values()
    known = plan.get(key) if plan is not None else None
    if known is None:
        compiled = kernel[grid](*args, **constants, **options)
        if plan is not None:
            tail = [constants[name] for name in kernel.arg_names[len(args) :]]
            device = driver.active.get_current_device()
            plan[key] = compiled.run, compiled.function, compiled.packed_metadata, device, tail
        return
    run, function, metadata, device, tail = known
    stream = driver.active.get_current_stream(device)
    # compiled[grid](...) also prepares for launch hooks, each time: a profiler that sets them sees first launches alone
    run(*(*grid, 1, 1)[:3], stream, function, metadata, None, None, None, *args, *tail)
