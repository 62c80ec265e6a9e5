"""Time per model call, which is a step of a distilled model, of the classes that people run in ComfyUI: dense against sparse.

    python -m benchmarks.comfyui_calls --comfyui PATH                   MiniMax H3, LTX-2, crossover, Wan 2.2
    python -m benchmarks.comfyui_calls --comfyui PATH --parts H3        one of them
    python -m benchmarks.comfyui_calls --comfyui PATH --parts tiny-H3 --device cpu  tries the script

ComfyUI's own classes at real sizes, random weights, in 16 bit and with the large layers in ComfyUI's int8 format. Variants:
ComfyUI's default attention, comfy-kitchen's dense INT8 attention, comfy-kitchen's sol_attn as core's node Model Sparse
Attention calls it by default (every step; core's own projection for H3, which feeds it, is not in ComfyUI 0.33), SLA2 with a
ratio fitted in every call, and "no self-attention", whose output is V: what is left is the bound of any faster attention,
and the difference to it is what a variant's self-attention takes. Writes benchmarks/results/comfyui-calls-<card>.json.
"""

import argparse
import gc
import statistics
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from tooling.comfyui import find_comfyui

from . import results
from .comfyui_models import CASES, call, crossover_cases, make_inputs, make_patcher
from .comfyui_step import comfyui_version, install_sla2
from .measure import environment, is_gpu
from .rivals.packages import add_peer_folders
from .table import calls_markdown
from .wan_in_comfyui import default_backend, import_comfyui, use_backend

OVERRIDE = "optimized_attention_override"
BOUND, DENSE = "no self-attention (bound)", "dense, ComfyUI's default"
# part: (case, blocks that run or None for all, whether it is compiled as well)
PARTS = {
    "H3": ("MiniMax H3", None, False),
    "LTX-2": ("LTX-2, second stage", None, False),
    "Wan 2.2": ("Wan 2.2 14B, 720p", 10, True),
    "tiny-H3": ("tiny H3", None, False),
    "tiny-LTX-2": ("tiny LTX-2", None, False),
    "tiny-Wan": ("tiny Wan", None, True),
}
DEFAULT = ("H3", "LTX-2", "crossover", "Wan 2.2")
LENGTHS = (1024, 2048, 4096, 6144, 8192, 12288, 16384)
FAILURES = (RuntimeError, ValueError, TypeError, ImportError, AttributeError, KeyError)
ENOUGH_S = 3  # a variant that took as long is not called again
SOL_TAU, SOL_EXTRA, SOL_BLOCK = 1.3, 256, 64  # the node's defaults, and the kernel's block


def main(argv=None):
    args = parse(argv)
    add_peer_folders(args.peers)
    import_comfyui(args.comfyui, args.device)
    about = {"environment": {**environment(args.device), "comfyui": comfyui_version()}, "default": default_backend()}
    print(", ".join(f"{name} {value}" for name, value in about["environment"].items()), flush=True)
    path = args.out or results.RESULTS / f"comfyui-calls-{results.card_file(about['environment']['card']).name}"
    for part in args.parts:
        if part == "crossover":
            measure_crossover(args, about, path)
            continue
        for int8 in (False, True) if args.weights is None else (args.weights == "int8",):
            try:
                measure(part, int8, args, about, path)
            except FAILURES as error:
                # of the model itself: written down, and the other parts are still measured
                name = shown_name(part, int8)
                row = {"part": name, "variant": "every variant", "seconds_per_step": None, "failed": in_a_line(error)}
                print(row, flush=True)
                results.save(path, results.replace_part(results.load(path), name, [row], about))
                free(args.device)
    print("\n" + calls_markdown(results.load(path)))


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", default=find_comfyui()[1])
    parser.add_argument("--parts", type=_parts, default=list(DEFAULT), help=f"of {', '.join((*PARTS, 'crossover'))}")
    parser.add_argument("--weights", choices=("16bit", "int8"), help="one of them alone")
    parser.add_argument("--calls", type=int, default=2, help="most timed calls; a short one warms up")
    parser.add_argument("--sparsities", type=lambda text: [float(x) for x in text.split(",")], default=[0.9, 0.97])
    parser.add_argument("--lengths", type=lambda text: [int(x) for x in text.split(",")], default=list(LENGTHS))
    parser.add_argument("--peers", help="folder with comfy_kitchen, where that is not installed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def _parts(text):
    parts = text.split(",")
    unknown = sorted(set(parts) - {*PARTS, "crossover"})
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join((*PARTS, 'crossover'))}")
    return parts


def measure(part, int8, args, about, path):
    """Rows of one model and one kind of weights, written down as they come."""
    name, blocks, compiled = PARTS[part]
    case, dtype = CASES[name], torch.bfloat16 if is_gpu(args.device) else torch.float32
    run, shown = blocks or case.layers, shown_name(part, int8)
    model = make_patcher(case, args.device, dtype, int8=int8, layers=blocks)
    inputs, rows, bound = make_inputs(case, args.device, dtype), [], None
    for variant, make in variants(case, args, compiled):
        row = {"part": shown, "variant": variant, "tokens": case.tokens, "blocks": run}
        try:
            row |= time_calls(make(model), inputs, args, whole="compiled" in variant)
        except FAILURES as error:
            # written down and shown: a backend that refuses a model must not end the run
            row |= {"seconds_per_step": None, "failed": in_a_line(error)}
        else:
            bound = row["seconds_per_step"] if variant == BOUND else bound
            row["attention_seconds"] = row["seconds_per_step"] - bound if "compiled" not in variant else None
        rows.append(row)
        print({key: value for key, value in row.items() if key != "seconds"}, flush=True)
        results.save(path, results.replace_part(results.load(path), shown, rows, about))
    del model, inputs
    free(args.device)


def shown_name(part, int8):
    name, blocks, _ = PARTS[part]
    of_all = f" ({blocks} of {CASES[name].layers} blocks)" if blocks else ""
    return f"{name}, {'int8 weights' if int8 else '16 bit'}{of_all}"


def in_a_line(error):
    """A failure as the table shows it; torch.compile names the cause in a later line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def variants(case, args, compiled):
    """[(name, function that makes the patched clone of a model)], the bound first."""
    found = [(BOUND, lambda model: with_override(model, case, value_alone)), (DENSE, lambda model: model.clone())]
    if is_gpu(args.device):
        found.append(("dense, comfy-kitchen's INT8", lambda model: use_backend(model, "comfy_kitchen_int8")))
        found.append((f"core's sol-attn, tau {SOL_TAU}", lambda model: with_override(model, case, sol_attn)))
    for sparsity in args.sparsities:
        name = f"SLA2, skips {100 * sparsity:g}%, fitted ratio"
        found.append((name, lambda model, sparsity=sparsity: with_sla2(model, sparsity, args)))
    if compiled:
        most = max(args.sparsities)
        found.append(("dense, compiled", lambda model: with_compiling(model.clone())))
        found.append(
            (f"SLA2, skips {100 * most:g}%, compiled", lambda model: with_compiling(with_sla2(model, most, args)))
        )
    return found


def with_sla2(model, sparsity, args, ratio="fitted"):
    return install_sla2(model, args.device, sparsity=sparsity, ratio_mode=ratio, minimum_tokens=0)


def with_compiling(patched):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    set_torch_compile_wrapper(patched, backend="inductor")
    return patched


def with_override(model, case, attend):
    """A clone whose video self-attention is attend(q, k, v, case), all (B, N, H, D); other calls stay as they are."""

    def override(func, q, k, v, heads, *args, skip_reshape=False, **kwargs):
        tokens = q.shape[2] if skip_reshape else q.shape[1]
        if q.shape != k.shape or tokens != case.tokens + sum(case.prefix):
            return func(q, k, v, heads, *args, skip_reshape=skip_reshape, **kwargs)
        views = [x.transpose(1, 2) if skip_reshape else x.unflatten(2, (heads, -1)) for x in (q, k, v)]
        return attend(*views, case).flatten(2)

    patched = model.clone()
    patched.model_options.setdefault("transformer_options", {})[OVERRIDE] = override
    return patched


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


def time_calls(patched, inputs, args, whole=False):
    """Seconds per model call (the lower median) and peak memory, weights included. whole: the warming call has all blocks."""
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
    if hook is not None:
        layers = hook.runs.finished()[-1].layers.values()
        row["sparse_calls"] = sum(layer.sparse for layer in layers)
        row["dense_calls"] = sum(layer.dense.total() for layer in layers)
        if not row["sparse_calls"] or row["dense_calls"]:
            reasons = sorted({reason for layer in layers for reason in layer.dense})
            raise RuntimeError(f"{row['dense_calls']} calls ran dense ({reasons}): these times would mean nothing.")
    return row


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


def measure_crossover(args, about, path, repeats=5):
    """From which length on SLA2 is faster than ComfyUI's default: milliseconds of a call of 8 blocks, at several lengths."""
    dtype, rows = torch.bfloat16 if is_gpu(args.device) else torch.float32, []
    cases = crossover_cases(args.lengths)
    models = {case.cls: make_patcher(case, args.device, dtype) for case in cases.values()}
    for name, case in cases.items():
        inputs, model = make_inputs(case, args.device, dtype), models[case.cls]
        for variant, patched in (
            (DENSE, model.clone()),
            ("SLA2, skips 90%, fitted ratio", with_sla2(model, 0.9, args)),
            ("SLA2, skips 90%, fixed ratio", with_sla2(model, 0.9, args, "fixed")),
        ):
            with at_work(patched, patched.get_attachment("sla2")):
                seconds = [timed(patched, inputs, args.device) for _ in range(repeats + 1)][1:]
            ms = 1000 * statistics.median(seconds)
            rows.append({"part": "crossover", "shape": name, "tokens": case.tokens, "variant": variant, "ms": ms})
            print(f"{name:32s} {variant:32s} {ms:8.2f} ms", flush=True)
        results.save(path, results.replace_part(results.load(path), "crossover", rows, about))
    del models
    free(args.device)


def free(device):
    gc.collect()
    if is_gpu(device):
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
