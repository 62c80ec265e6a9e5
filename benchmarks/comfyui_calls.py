"""Time per model call, which is a step of a distilled model, of the classes that people run in ComfyUI: dense against sparse.

    python -m benchmarks.comfyui_calls --comfyui PATH                   MiniMax H3, LTX-2, crossover, Wan 2.2, memory
    python -m benchmarks.comfyui_calls --comfyui PATH --parts H3        one of them
    python -m benchmarks.comfyui_calls --comfyui PATH --parts tiny-H3 --device cpu  tries the script

ComfyUI's own classes at real sizes, random weights, in 16 bit and with the large layers in ComfyUI's int8 format; Wan in its
fp8 format and compiled, too. Variants: ComfyUI's default attention, comfy-kitchen's dense INT8 attention, comfy-kitchen's
sol_attn as core's node Model Sparse Attention calls it by default (every step; core's own projection for H3, which feeds it, is
not in ComfyUI 0.33), SLA2 with a ratio fitted in every call, and "no self-attention", whose output is V: what is left is the
bound of any faster attention, and the difference to it is what a variant's self-attention takes. The costliest kernels are
listed.
Part "memory" is comfyui_memory.py. Writes benchmarks/results/comfyui-calls-<card>.json.
"""

import argparse
import statistics
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

from tooling.comfyui import find_comfyui

from . import lists, results
from .comfyui_memory import measure_memory
from .comfyui_models import CASES, WEIGHTS, crossover_cases, make_inputs, make_patcher
from .comfyui_step import comfyui_version
from .comfyui_variants import BOUND, DENSE, at_work, free, sla2_name, time_calls, timed, variants, with_sla2
from .measure import environment, is_gpu
from .rivals.packages import add_peer_folders
from .table import calls_markdown, memory_markdown
from .wan_in_comfyui import default_backend, import_comfyui


@dataclass(frozen=True)
class Part:
    """A case and what is measured of it. blocks: how many run, None for all. weights: of WEIGHTS. compiled: as well."""

    case: str
    blocks: int | None = None
    weights: tuple = ("16bit", "int8")
    compiled: bool = False


PARTS = {
    "H3": Part("MiniMax H3"),
    "LTX-2": Part("LTX-2, second stage"),
    "Wan 2.2": Part("Wan 2.2 14B, 720p", blocks=10, weights=WEIGHTS, compiled=True),
    "tiny-H3": Part("tiny H3"),
    "tiny-LTX-2": Part("tiny LTX-2"),
    "tiny-Wan": Part("tiny Wan", weights=WEIGHTS, compiled=True),
}
OTHERS = ("crossover", "memory", "tiny-memory")
DEFAULT = ("H3", "LTX-2", "crossover", "Wan 2.2", "memory")
LENGTHS = (1024, 2048, 4096, 6144, 8192, 12288, 16384)
SHOWN = {"16bit": "16 bit", "int8": "int8 weights", "fp8": "fp8 weights"}
FAILURES = (RuntimeError, ValueError, TypeError, ImportError, AttributeError, KeyError)
KERNELS = 24  # that are listed, of the bound and of the highest sparsity


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
        elif part.endswith("memory"):
            measure_memory("tiny H3" if part.startswith("tiny") else "MiniMax H3", args, about, path)
        else:
            for weights in filter(args.weights.__contains__, PARTS[part].weights):
                measure_or_say(part, weights, args, about, path)
    print("\n" + calls_markdown(results.load(path)) + "\n\n" + memory_markdown(results.load(path)))


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", default=find_comfyui()[1])
    known = (*PARTS, *OTHERS)
    parser.add_argument("--parts", type=_chosen(known), default=list(DEFAULT), help=f"of {', '.join(known)}")
    parser.add_argument("--weights", type=_chosen(WEIGHTS), default=list(WEIGHTS), help=f"of {', '.join(WEIGHTS)}")
    parser.add_argument(
        "--skip", nargs="+", default=[], help="texts: what holds one of them is left out of WEIGHTS: VARIANT"
    )
    parser.add_argument("--blocks", type=int, help="how many blocks run, in all parts")
    parser.add_argument("--calls", type=int, default=2, help="most timed calls; a short one warms up")
    parser.add_argument("--sparsities", type=lists.numbers, default=[0.9, 0.97])
    parser.add_argument("--lengths", type=lists.whole_numbers, default=list(LENGTHS))
    parser.add_argument("--peers", help="folder with comfy_kitchen, where that is not installed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def _chosen(known):
    def read(text):
        chosen = text.split(",")
        unknown = sorted(set(chosen) - set(known))
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(known)}")
        return chosen

    return read


def measure_or_say(part, weights, args, about, path):
    """Rows of one model and one kind of weights; a failure of the model itself is written down, and the run goes on."""
    try:
        measure(part, weights, args, about, path)
    except FAILURES as error:
        name = shown_name(part, weights, args)
        row = {"part": name, "variant": "every variant", "seconds_per_step": None, "failed": in_a_line(error)}
        print(row, flush=True)
        results.save(path, results.replace_part(results.load(path), name, [row], about))
        free(args.device)


def measure(part, weights, args, about, path):
    """Rows of one model and one kind of weights, written down as they come."""
    case, dtype = CASES[PARTS[part].case], torch.bfloat16 if is_gpu(args.device) else torch.float32
    blocks, shown = blocks_of(part, args), shown_name(part, weights, args)
    model = make_patcher(case, args.device, dtype, weights=weights, layers=blocks)
    inputs, rows, bound = make_inputs(case, args.device, dtype), [], None
    for variant, make in variants(case, args, PARTS[part].compiled):
        if any(text in f"{weights}: {variant}" for text in args.skip):
            continue
        row = {"part": shown, "variant": variant, "tokens": case.tokens, "blocks": blocks}
        try:
            listed = KERNELS if variant in (BOUND, sla2_name(max(args.sparsities))) else 0
            row |= time_calls(make(model), inputs, args, whole="compiled" in variant, kernels=listed)
        except FAILURES as error:
            # written down and shown: a backend that refuses a model must not end the run
            traceback.print_exc()
            row |= {"seconds_per_step": None, "failed": in_a_line(error)}
        else:
            bound = row["seconds_per_step"] if variant == BOUND else bound
            comparable = bound is not None and "compiled" not in variant
            row["attention_seconds"] = row["seconds_per_step"] - bound if comparable else None
        rows.append(row)
        print({key: value for key, value in row.items() if key not in ("seconds", "kernels")}, flush=True)
        results.save(path, results.replace_part(results.load(path), shown, rows, about))
    del model, inputs
    free(args.device)


def blocks_of(part, args):
    return args.blocks or PARTS[part].blocks or CASES[PARTS[part].case].layers


def shown_name(part, weights, args):
    blocks, case = blocks_of(part, args), PARTS[part].case
    of_all = f" ({blocks} of {CASES[case].layers} blocks)" if blocks < CASES[case].layers else ""
    return f"{case}, {SHOWN[weights]}{of_all}"


def in_a_line(error):
    """A failure as the table shows it; torch.compile names the cause in a later line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def measure_crossover(args, about, path, repeats=5):
    """From which length on SLA2 is faster than ComfyUI's default: milliseconds of a call of 8 blocks, at several lengths."""
    dtype, rows = torch.bfloat16 if is_gpu(args.device) else torch.float32, []
    cases = crossover_cases(args.lengths)
    models = {case.cls: make_patcher(case, args.device, dtype) for case in cases.values()}
    for name, case in cases.items():
        inputs, model = make_inputs(case, args.device, dtype), models[case.cls]
        for variant, patched in (
            (DENSE, model.clone()),
            (sla2_name(0.9), with_sla2(model, 0.9, args)),
            (sla2_name(0.9, "fixed"), with_sla2(model, 0.9, args, "fixed")),
        ):
            with at_work(patched, patched.get_attachment("sla2")):
                seconds = [timed(patched, inputs, args.device) for _ in range(repeats + 1)][1:]
            ms = 1000 * statistics.median(seconds)
            rows.append({"part": "crossover", "shape": name, "tokens": case.tokens, "variant": variant, "ms": ms})
            print(f"{name:32s} {variant:32s} {ms:8.2f} ms", flush=True)
        results.save(path, results.replace_part(results.load(path), "crossover", rows, about))
    del models
    free(args.device)


if __name__ == "__main__":
    sys.exit(main())
