"""One marked self-attention call, from ComfyUI's arguments to its output: sparse where it can be, else dense and counted.

What stands in the way of a sparse call raises RunDense, at whatever depth it is found; attend() alone catches it.
"""

from functools import partial

import torch

from ...sla2_kernels.loops import watch_loops
from ...sla2_kernels.support import resolve_precision
from ..compat.override_arguments import by_name
from ..runs.record import capturing
from .call import check_supported, read_call
from .failures import attempt, attempt_rest, check_attempted, check_output, rows_or_below
from .layer_requests import TRAINED_FOR_VSA
from .run_dense import RunDense, say_once, stop_where_asked
from .sparse_call import (
    own_rows,
    rows_below,
    rows_of_request,
    sparse_request,
    takes_rows,
    video_part,
    with_dense_rows,
)
from .steps import check_length, planned_sparsity
from .video_tokens import DENSE_BY_NATURE


def attend(call, layer, below, args, kwargs, is_default=False):
    """Output of one self-attention call of a ModelCall; ``below`` computes it densely from the arguments untouched.

    is_default: nobody chose ``below``: it is ComfyUI's default, PyTorch's attention.
    """
    if call.repeated:
        return _repeat(call, layer, below, args, kwargs)
    call.counts["attended"] += 1
    try:
        return _attend_sparse(call, layer, below, args, kwargs, is_default)
    except RunDense as found:
        reason, by_setting, sparsity = found.reason, found.by_setting, found.sparsity
    # the traceback, and the tensors that its frames held, are freed only here
    if not by_setting:
        if reason not in DENSE_BY_NATURE:
            stop_where_asked(call.hook.settings, reason, f" in layer {layer}")
        say_once(call.run, layer, reason)
    # autograd has saved tensors of a sparse output even where it is not used
    call.decisions.take(layer, (sparsity, False))
    return _attend_dense(call.run, layer, reason, below, args, kwargs)


def _attend_sparse(call, layer, below, args, kwargs, is_default):
    settings = call.hook.settings
    sparsity = planned_sparsity(settings, layer, call.step)
    request = read_call(args, kwargs)
    check_length(settings, max(request.tokens, request.key_tokens))
    if layer in call.requests.vsa:
        raise RunDense(TRAINED_FOR_VSA)
    request, exact = call.video_request(request)
    precision = resolve_precision(settings.precision, request.q.device)
    check_supported(request, precision)
    check_attempted(call, layer)
    result = attempt(call, layer, request.q.device, lambda: _compute(call, layer, request, exact, sparsity, precision))
    out, ratio, kept, keys, judging, loops = result
    own, run = own_rows(out, request, exact), call.run
    check_output(call, layer, own, sparsity, (request.q, request.k, request.v))
    # before rows are moved or written; counted once the call is sure to be sparse
    errors = None if judging is None else judging.errors(own)
    dense = rows_below(below, args, kwargs)
    takes = is_default and exact.dense_queries and not call.has_autograd and takes_rows(request)
    if takes:
        dense = rows_or_below(call, layer, partial(rows_of_request, request), dense)
    # what the dense rows' attention takes: whole dense attention needs less
    whole = attempt_rest(call, request.q.device, lambda: with_dense_rows(out, request, exact, dense))
    if errors is not None:
        run.count_errors(layer, errors)
    if takes and run.rows_failed is not None:
        run.count_call_with_rows_below()
    # rows that a reference's last block computes twice count once
    rows = min(ratio.shape[2], request.tokens - exact.dense_queries)
    run.count_sparse(layer, (*ratio.shape[:2], rows), kept, keys, precision, ratio, request.tokens)
    run.count_loops(loops)
    call.decisions.take(layer, (sparsity, True))
    return whole


def _attend_dense(run, layer, reason, below, args, kwargs):
    run.count_dense(layer, reason)
    tensor = by_name(args, kwargs).get("q")
    device = tensor.device if isinstance(tensor, torch.Tensor) else torch.device("cpu")
    with run.timed(layer, "dense", device):
        return below(*args, **kwargs)


def _repeat(call, layer, below, args, kwargs):
    """A call that gradient checkpointing recomputes, as it went the first time: if it fails now, it has no other way."""
    sparsity, is_used = call.decisions.again(layer)
    if sparsity is not None:
        request, exact = call.read(args, kwargs)
        weights = call.hook.weights.on_device(layer, request.q.device, sparsity)
        precision = resolve_precision(call.hook.settings.precision, request.q.device)
        options = {"precision": precision, "reference_keys": call.hook.settings.reference_keys}
        out, *_ = sparse_request(request, exact, weights, sparsity=sparsity, **options)
        if is_used:
            return with_dense_rows(out, request, exact, rows_below(below, args, kwargs))
    return below(*args, **kwargs)


def _compute(call, layer, request, exact, sparsity, precision):
    """(*sparse_request(), the loops that ran) of one call, timed."""
    run, device = call.run, request.q.device
    weights = call.hook.weights.on_device(layer, device, sparsity)
    if run.maps is not None:
        run.maps.see(layer, video_part(request, exact), weights, sparsity, precision)
    options = {"precision": precision, "reference_keys": call.hook.settings.reference_keys}
    options["call_ratio"] = _call_ratio(call, layer, request, weights, sparsity)
    with run.timed(layer, "sparse", device), watch_loops() as loops:
        return *sparse_request(request, exact, weights, sparsity=sparsity, **options), loops


def _call_ratio(call, layer, request, weights, sparsity):
    """CallRatio where this call's ratio is fitted. Training estimates it, whose recomputed calls must find it again, and
    so does a call that a CUDA graph captures, in which the choice of rows may not be copied to the device."""
    q, k, v = request.q, request.k, request.v
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v))
    # the first pass of a checkpoint that enters its blocks without autograd
    trains = trains or (call.has_autograd and not torch.is_grad_enabled())
    if not weights.fits or trains or capturing(q.device):
        return None
    kind = layer, q.device, sparsity, call.halves
    measures = None if call.step.choice is None else call.step.choice.measures
    return call.run.fitted_ratios.of_call(kind, call.hook.facts.num_heads, call.steps, measures)
