"""A sparse call that fails while it runs: memory, a kernel that cannot be built or loaded, NaN in its output. Dense attention takes over.

Each failure is counted with its reason and said once per run. All other errors are raised unchanged:
ComfyUI's interrupt, another pack's error, a mistake of ours.
"""

import logging

import torch

from ...sla2_kernels.kernel_failures import failure_in_a_line, kernel_failure_remedy
from .run_dense import RunDense, stop_where_asked

logger = logging.getLogger("sla2")

OUT_OF_MEMORY = "memory ran out in sparse attention: the rest of this step runs dense"
NOT_FINITE = "the layer's first sparse output held NaN or infinity: it runs dense for this run"
NO_KERNEL = "the kernels could not be built or started: every layer runs dense for this run"


def is_out_of_memory(error):
    """Of a GPU or of the host, by any of torch's names for it."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def check_attempted(call, layer):
    """Raises RunDense where an earlier failure of this run keeps the call dense."""
    failed = call.run.failed_layers
    if layer in failed or None in failed:
        raise RunDense(failed.get(layer) or failed[None])
    if call.counts[OUT_OF_MEMORY]:
        raise RunDense(OUT_OF_MEMORY)


def attempt(call, layer, device, compute):
    """What compute() returns; raises RunDense where it failed in a way that dense attention survives."""
    try:
        return compute()
    except Exception as error:
        remedy = kernel_failure_remedy(error)
        if is_out_of_memory(error):
            call.counts[OUT_OF_MEMORY] += 1
            reason = OUT_OF_MEMORY
        elif remedy is not None:
            reason = call.run.failed_layers[None] = NO_KERNEL
            call.run.note(f"{NO_KERNEL} ({failure_in_a_line(error)}); {remedy}")
        else:
            raise
    # only now are the tensors freed that the error's traceback held
    _free(device)
    raise RunDense(reason)


def rows_or_below(call, layer, compute, below):
    """A function of slices: compute(*slices), rows of text and sound; once its kernels cannot be built or started, below(*slices).

    Raises RuntimeError instead where the node was asked to stop.
    """
    run = call.run

    def rows(*slices):
        if run.rows_failed is None:
            try:
                return compute(*slices)
            except Exception as error:
                remedy = kernel_failure_remedy(error)
                if is_out_of_memory(error) or remedy is None:
                    raise
                reason = f"the kernels could not be built or started ({failure_in_a_line(error)}); {remedy}"
                stop_where_asked(call.hook.settings, reason, f" in layer {layer}")
                run.rows_failed = reason
                logger.warning(
                    "SLA2: PyTorch's attention computes the rows of text and sound for this run: %s", run.rows_failed
                )
        return below(*slices)

    return rows


def attempt_rest(call, device, compute):
    """As attempt() for what comes after the sparse loop, the exact rows included: only out of memory is survived."""
    try:
        return compute()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        call.counts[OUT_OF_MEMORY] += 1
    _free(device)
    raise RunDense(OUT_OF_MEMORY)


def _free(device):
    if device.type == "cuda":
        torch.cuda.empty_cache()


@torch.no_grad()
def check_output(call, layer, out, sparsity, inputs):
    """Raises RunDense where the layer's first sparse output of the run holds NaN or infinity. Later ones are counted.

    The first is waited for, once per layer and run; the count of later ones stays on the device until the run ends.
    """
    if not call.run.count_output(layer, out):
        return
    call.run.failed_layers[layer] = NOT_FINITE
    came_in = not all(torch.isfinite(tensor).all() for tensor in inputs)
    whose = "its inputs held them already" if came_in else "its inputs were finite"
    call.run.note(f"layer {layer}: sparse attention gave NaN or infinity ({whose}), so it ran dense")
    raise RunDense(NOT_FINITE, sparsity=sparsity)
