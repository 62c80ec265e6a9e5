"""Part "memory" of comfyui_calls: MiniMax H3 at its real shape, what one attention call takes and whole calls on smaller cards.

One call: the most bytes that the video's self-attention held beyond q, k, v and its output, in the class itself. Smaller
cards: int8 weights, PyTorch's memory capped at 24 and 16 GiB, and as many weights on the card as ComfyUI would keep there
without its dynamic VRAM; it streams the others in every call.
"""

import torch

from . import results
from .comfyui_models import CASES, make_inputs, make_patcher
from .comfyui_variants import (
    DENSE,
    OVERRIDE,
    SOL,
    at_work,
    free,
    is_video_call,
    sol_attn,
    time_calls,
    timed,
    variants,
    with_override,
    with_sla2,
)
from .measure import is_gpu

GIB = 2**30
CAPS = (16, 24)  # GiB, ascending: what is loaded stays
USAGE = 0.114  # memory_usage_factor of MiniMax H3 in ComfyUI's table of models
PART = "memory"


def measure_memory(name, args, about, path):
    """Writes the rows of both measurements as they come."""
    rows = []

    def save(row):
        rows.append({"part": PART, "model": name, **row})
        print(rows[-1], flush=True)
        results.save(path, results.replace_part(results.load(path), PART, rows, about))

    attention_rows(CASES[name], args, save)
    free(args.device)
    capped_rows(CASES[name], args, save)
    free(args.device)


def attention_rows(case, args, save):
    dtype = torch.bfloat16 if is_gpu(args.device) else torch.float32
    model, inputs = make_patcher(case, args.device, dtype, layers=2), make_inputs(case, args.device, dtype)
    for variant, make in variants(case, args)[1:]:
        patched, seen = make(model), []
        options = patched.model_options.setdefault("transformer_options", {})
        options[OVERRIDE] = watched(options.get(OVERRIDE), case, args.device, seen)
        with at_work(patched, patched.get_attachment("sla2")):
            for _ in range(2):
                timed(patched, inputs, args.device)
        save({"variant": variant, "q_bytes": seen[-1][0], "extra_bytes": seen[-1][1]})


def watched(below, case, device, seen):
    """The override ``below``, or ComfyUI's attention; appends (bytes of q, extra bytes at the peak) to ``seen`` per video call."""

    def override(func, q, k, v, heads, *args, skip_reshape=False, **kwargs):
        def attend():
            if below is None:
                return func(q, k, v, heads, *args, skip_reshape=skip_reshape, **kwargs)
            return below(func, q, k, v, heads, *args, skip_reshape=skip_reshape, **kwargs)

        if not is_video_call(case, q, k, skip_reshape):
            return attend()
        before = None
        if is_gpu(device):
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        out = attend()
        size = out.numel() * out.element_size()
        extra = None if before is None else torch.cuda.max_memory_allocated(device) - before - size
        seen.append((size, extra))
        return out

    return override


def capped_rows(case, args, save):
    """Seconds and peak memory of whole calls, at each cap."""
    dtype = torch.bfloat16 if is_gpu(args.device) else torch.float32
    model = make_patcher(case, args.device, dtype, weights="int8", layers=args.blocks)
    model.offload_device = torch.device("cpu")
    model.model.to("cpu")
    free(args.device)
    inputs, loaded = make_inputs(case, args.device, dtype), 0
    try:
        for cap in CAPS:
            limit(cap, args.device)
            budget = weight_bytes(cap * GIB, inputs)
            model.partially_load(torch.device(args.device), extra_memory=budget - loaded)
            loaded = model.model.model_loaded_weight_memory
            fixed = {"cap_gib": cap, "loaded_bytes": loaded, "weight_bytes": model.model_size()}
            for variant, make in on_smaller_cards(case, args):
                save({"variant": variant, **fixed, **timed_or_failed(make(model), inputs, args)})
    finally:
        limit(None, args.device)
        model.detach()


def on_smaller_cards(case, args):
    """Core's node, or its default where that does not run, and SLA2."""
    least = min(args.sparsities)
    ours = (f"SLA2, skips {100 * least:g}%", lambda model: with_sla2(model, least, args))
    if is_gpu(args.device):
        return [(SOL, lambda model: with_override(model, case, sol_attn)), ours]
    return [(DENSE, lambda model: model.clone()), ours]


def timed_or_failed(patched, inputs, args):
    try:
        row = time_calls(patched, inputs, args)
    except RuntimeError as error:
        # what a card this small does is the result
        return {"seconds_per_step": None, "failed": f"{type(error).__name__}: {error}"[:300]}
    if is_gpu(args.device):
        row["reserved_bytes"] = torch.cuda.max_memory_reserved(args.device)
    return row


def limit(gib, device):
    """Caps what PyTorch may take of the card, or lifts the cap."""
    if is_gpu(device):
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(1.0 if gib is None else gib * GIB / total)


def weight_bytes(card_bytes, inputs):
    """How many bytes of weights ComfyUI 0.33 keeps on a card of this size beside a call with these inputs."""
    from comfy.model_management import extra_reserved_memory, minimum_inference_memory

    numbers = sum(latent.numel() for latent in inputs["x"])
    estimated = numbers * 2 * 0.01 * USAGE * 2**20
    return max(card_bytes - max(minimum_inference_memory(), estimated + extra_reserved_memory()), 0.1)
