"""One model call of ComfyUI with each way to attend, and how long it takes."""

import gc
import statistics
import time
from contextlib import contextmanager, nullcontext

import torch

from .breakdown import costliest_kernels
from .comfyui_models import FORMATS, call
from .comfyui_step import install_sla2
from .measure import is_gpu
from .wan_in_comfyui import use_backend

OVERRIDE = "optimized_attention_override"
BOUND, DENSE = "no self-attention (bound)", "dense, ComfyUI's default"
SOL_TAU, SOL_EXTRA, SOL_BLOCK = 1.3, 256, 64  # the node's defaults, and the kernel's block
SOL = f"core's sol-attn, tau {SOL_TAU}"
PROFILED = 4  # blocks
ENOUGH_S = 3  # a variant that took as long is not called again


def variants(case, args, compiled=False):
    """[(name, function that makes the patched clone of a model)], the bound first."""
    found = [(BOUND, lambda model: with_override(model, case, value_alone)), (DENSE, lambda model: model.clone())]
    if is_gpu(args.device):
        found.append(("dense, comfy-kitchen's INT8", lambda model: use_backend(model, "comfy_kitchen_int8")))
        found.append((SOL, lambda model: with_override(model, case, sol_attn)))
    for sparsity in args.sparsities:
        found.append((sla2_name(sparsity), lambda model, sparsity=sparsity: with_sla2(model, sparsity, args)))
    if compiled:
        most = max(args.sparsities)
        found.append(("dense, compiled", lambda model: with_compiling(model.clone())))
        found.append(
            (f"SLA2, skips {100 * most:g}%, compiled", lambda model: with_compiling(with_sla2(model, most, args)))
        )
    return found


def sla2_name(sparsity, ratio="fitted"):
    return f"SLA2, skips {100 * sparsity:g}%, {ratio} ratio"


def with_sla2(model, sparsity, args, ratio="fitted"):
    return install_sla2(model, args.device, sparsity=sparsity, ratio_mode=ratio, minimum_tokens=0)


def with_compiling(patched):
    """As ComfyUI's node TorchCompileModel does it, but around layers with 8-bit weights, at which that node fails."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    def kept(guards):
        return ["transformer_options" not in guard.name for guard in guards]

    around_8bit_layers(patched.model.diffusion_model)
    set_torch_compile_wrapper(patched, backend="inductor", options={"guard_filter_fn": kept})
    return patched


def around_8bit_layers(model):
    """torch.compile runs the model's layers with 8-bit weights as they are, from now on.

    ComfyUI 0.33 cannot trace them: int8's feed-forward hands fake tensors to a CUDA kernel, fp8 makes a tensor subclass anew.
    """
    import comfy.ops

    quantised = {
        type(module): module.quant_format for module in model.modules() if getattr(module, "quant_format", None)
    }
    for cls in quantised:
        cls.forward = torch.compiler.disable(cls.forward)
    if FORMATS["int8"][0] in quantised.values():
        comfy.ops.linear_input_act = torch.compiler.disable(comfy.ops.linear_input_act)


def with_override(model, case, attend):
    """A clone whose video self-attention is attend(q, k, v, case), all (B, N, H, D); other calls stay as they are."""

    def override(func, q, k, v, heads, *args, skip_reshape=False, **kwargs):
        if not is_video_call(case, q, k, skip_reshape):
            return func(q, k, v, heads, *args, skip_reshape=skip_reshape, **kwargs)
        views = [x.transpose(1, 2) if skip_reshape else x.unflatten(2, (heads, -1)) for x in (q, k, v)]
        return attend(*views, case).flatten(2)

    patched = model.clone()
    patched.model_options.setdefault("transformer_options", {})[OVERRIDE] = override
    return patched


def is_video_call(case, q, k, skip_reshape):
    """Whether an attention call is the video's self-attention, by its tokens."""
    tokens = q.shape[2] if skip_reshape else q.shape[1]
    return q.shape == k.shape and tokens == case.tokens + sum(case.prefix)


def value_alone(q, k, v, case):
    return v


def sol_attn(q, k, v, case):
    """As the node calls it: what stands before the video is exact as keys, the sound before it as queries, too."""
    import comfy_kitchen

    if not comfy_kitchen.sol_attn_is_available(q.device):
        raise RuntimeError("comfy_kitchen's compiled sol_attn does not run on this device")
    text, end = case.prefix[0] // SOL_BLOCK, -(-sum(case.prefix) // SOL_BLOCK)
    exact = {"sink_blocks": [0, end], "sink_q": [text, end]} if end else {}
    return comfy_kitchen.sol_attn(q, k, v, tau=SOL_TAU, token_aug=SOL_EXTRA, **exact)


def time_calls(patched, inputs, args, whole=False, kernels=0):
    """Seconds per model call (the lower median) and peak memory, weights included.

    whole: the warming call has all blocks. kernels: how many of the costliest are listed, of one more call of PROFILED blocks.
    """
    hook = patched.get_attachment("sla2")
    free(args.device)
    with at_work(patched, hook):
        with nullcontext() if whole else first_blocks(patched.model.diffusion_model, 2):
            first = timed(patched, inputs, args.device)
        if is_gpu(args.device):
            torch.cuda.reset_peak_memory_stats(args.device)
        seconds = []
        while len(seconds) < args.calls and sum(seconds) < ENOUGH_S:
            seconds.append(timed(patched, inputs, args.device))
        row = {"seconds_per_step": statistics.median_low(seconds), "seconds": seconds, "warm_up_seconds": first}
        if is_gpu(args.device):
            row["peak_bytes"] = torch.cuda.max_memory_allocated(args.device)
            if kernels:
                with first_blocks(patched.model.diffusion_model, PROFILED):
                    row["kernels"] = listed_kernels(lambda: call(patched, inputs), kernels)
    if hook is not None:
        row |= call_counts(hook)
    return row


def call_counts(hook):
    """Calls of the hook's last run; raises RuntimeError where one of them ran dense."""
    layers = hook.runs.finished()[-1].layers.values()
    row = {
        "sparse_calls": sum(layer.sparse for layer in layers),
        "dense_calls": sum(layer.dense.total() for layer in layers),
    }
    if not row["sparse_calls"] or row["dense_calls"]:
        reasons = sorted({reason for layer in layers for reason in layer.dense})
        raise RuntimeError(f"{row['dense_calls']} calls ran dense ({reasons}): these times would mean nothing.")
    return row


def listed_kernels(function, count):
    return [{"ms": ms, "launches": n, "name": name[:120]} for ms, n, name in costliest_kernels(function, count)]


@contextmanager
def at_work(patched, hook):
    """The model with its clone's patches, inside one sampling run as our hook sees it."""
    patched.patch_model(load_weights=False)
    if hook is not None:
        hook.begin_run(patched)
    try:
        yield
    finally:
        if hook is not None:
            hook.end_run()
        patched.unpatch_model(unpatch_weights=False)


@contextmanager
def first_blocks(model, count):
    """The model with its first blocks alone: enough to warm up every kernel."""
    name = "blocks" if hasattr(model, "blocks") else "transformer_blocks"
    blocks = getattr(model, name)
    setattr(model, name, blocks[:count])
    try:
        yield
    finally:
        setattr(model, name, blocks)


def timed(patched, inputs, device):
    """Seconds of one call, the GPU waited for; an output that is not finite is an error."""
    if is_gpu(device):
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    out = call(patched, inputs)
    if is_gpu(device):
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - begin
    parts = out if isinstance(out, (list, tuple)) else [out]
    if not all(bool(torch.isfinite(part).all()) for part in parts):
        raise RuntimeError("the model's output holds NaN or infinity: this time would mean nothing.")
    return seconds


def free(device):
    gc.collect()
    if is_gpu(device):
        torch.cuda.empty_cache()
