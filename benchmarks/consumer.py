"""SLA2 in the instructions of the cards most users own (RTX 30, 40, 50, A100, L40), beside comfy-kitchen's sol_attn: timed on
an H100 or H200, because no such card is at hand.

    python -m benchmarks.consumer --peers FOLDER         all shapes in sm_89's instructions, 97% also in sm_80's and 86's
    python -m benchmarks.consumer --archs 89 --shapes LTX-2
    python -m benchmarks.consumer --table --out FILE     the table of a results file, nothing is measured
    python -m benchmarks.consumer --roofline             by data sheet, on any machine

What it is: see consumer_imitation.py. Each setting is first checked against float64. A time is the GPU's, by CUDA graph; the
host's time and the launches stand beside it. "fitted" is one call in eight that fits the ratio and seven that use it.
A kernel whose matrix instructions are not those that the card itself would run marks its row.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from . import lists, results
from .consumer_imitation import CARDS, Imitation
from .consumer_roofline import SHEETS, milliseconds, sla2_work, sol_work
from .consumer_table import consumer_markdown
from .inputs import Shape, make_inputs
from .measure import environment, event_ms, graph_timer, launch_ms
from .rivals import sol_attn
from .rivals.packages import add_peer_folders

SHAPES = {
    shape.name: shape
    for shape in (
        Shape("14B-720p", 40, (21, 45, 80)),
        Shape("H3", 56, (1, 1, 42000)),  # MiniMax H3, 1344x768x124
        Shape("1.3B-480p", 12, (21, 30, 52)),
        Shape("LTX-2", 32, (16, 22, 40)),
        Shape("14B-480p", 40, (21, 30, 52)),
    )
}
CHECKED = Shape("checked", 3, (5, 20, 31))
FORMATS = {"pv": "int8", "sums": "int8", "scores": "16bit"}
TOLERANCE = 0.06  # of the output against float64, Gaussian inputs
STEPS_PER_FIT = 8
REPLAYS = 3
HOPPER = 90  # as shipped, nothing imitated


def main(argv=None):
    args = parse(argv)
    if args.roofline:
        print(roofline_table(args.sparsities))
    elif args.table:
        print(consumer_markdown(results.load(args.out)))
    elif args.child:
        measure_arch(args)
    else:
        for arch in args.archs:
            measure_apart(args, arch)
        print(consumer_markdown(results.load(args.out)))


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", type=lists.whole_numbers, default=[89, 80, 86])
    add_call_arguments(parser, list(SHAPES))
    parser.add_argument(
        "--all-methods",
        action="store_true",
        help="also an estimated ratio, top-k only and SLA v1, for error_against_time",
    )
    parser.add_argument("--table", action="store_true", help="print the table of the results file")
    parser.add_argument("--roofline", action="store_true", help="print the estimate by data sheet")
    parser.add_argument("--child", type=int, metavar="ARCH", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    check_shapes(parser, args)
    if unknown := [arch for arch in args.archs if arch not in (*CARDS, HOPPER)]:
        parser.error(f"sm_{unknown[0]} is not one of {', '.join(map(str, (*CARDS, HOPPER)))}")
    if not args.roofline and not (args.table and args.out) and not torch.cuda.is_available():
        parser.error(
            "this times kernels on an H100 or H200, and there is no GPU; --roofline and --table --out FILE need none"
        )
    if args.out is None and not args.roofline:
        args.out = default_out()
    return args


def add_call_arguments(parser, shapes):
    """What decides the calls, and where their rows go. shapes: names, the default."""
    parser.add_argument("--shapes", type=lists.names, default=shapes)
    parser.add_argument("--sparsities", type=lists.numbers, default=[0.97, 0.9])
    parser.add_argument("--peers", help="folder with comfy-kitchen (see benchmarks/rivals/packages.py)")
    parser.add_argument("--out", type=Path, help="results file; default benchmarks/results/consumer-<card>.json")


def check_shapes(parser, args):
    if unknown := [name for name in args.shapes if name not in SHAPES]:
        parser.error(f"{unknown[0]!r} is not one of {', '.join(SHAPES)}")


def default_out():
    """The results file of this machine's card."""
    card = results.card_file(environment("cuda")["card"])
    return card.with_name(f"consumer-{card.name}")


def measure_apart(args, arch):
    """One architecture in a process and a Triton cache of its own; its rows replace those of an earlier run."""
    with tempfile.TemporaryDirectory() as cache:
        words = [
            sys.executable, "-m", "benchmarks.consumer", "--child", str(arch), "--shapes", ",".join(args.shapes),
            "--sparsities", ",".join(map(str, args.sparsities)), "--out", str(args.out),
        ]  # fmt: skip
        peers = (["--peers", args.peers] if args.peers else []) + ["--all-methods"] * args.all_methods
        subprocess.run([*words, *peers], env={**os.environ, "TRITON_CACHE_DIR": cache}, check=True)


def measure_arch(args):
    """Measures in this process, which from now on compiles for the architecture imitated, and writes after each shape."""
    imitation = Imitation(CARDS[args.child]) if args.child != HOPPER else None
    if imitation is not None:
        imitation.begin()
    add_peer_folders(args.peers)
    run = Run(args.child, imitation)
    about = {"environment": environment("cuda")}
    for name in args.shapes:
        for sparsity in args.sparsities:
            run.time(SHAPES[name], sparsity, peers=bool(args.peers), all_methods=args.all_methods)
            about["kernels"] = [vars(kernel) for kernel in imitation.kernels] if imitation else []
            content = results.load(args.out)
            results.save(args.out, results.replace_part(content, f"sm_{args.child}", run.rows, about))


class Run:
    """Rows of one architecture. imitation: an Imitation that began, or None on Hopper as shipped."""

    def __init__(self, arch, imitation):
        self.arch, self.imitation, self.rows = arch, imitation, []
        self._errors = {}

    def time(self, shape, sparsity, peers, all_methods=False):
        q, k, v = make_inputs(shape)
        if sparsity not in self._errors:
            self._errors[sparsity] = output_error(sparsity)
        error = self._errors[sparsity]
        fixed, fitting = sla2_calls(q, k, v, sparsity)
        for setting, call in (("a ratio per head", fixed), ("a call that fits", fitting)):
            self._add(shape, "sla2", setting, sparsity, call, relative_error=error, passed=error <= TOLERANCE)
        one, eighth = self.rows[-2], self.rows[-1]
        ms = ((STEPS_PER_FIT - 1) * one["ms"] + eighth["ms"]) / STEPS_PER_FIT
        self.rows.append(
            one | {"setting": "fitted", "ms": ms, "kernels": {}, "host_ms": max(one["host_ms"], eighth["host_ms"])}
        )
        print(line(self.rows[-1]), flush=True)
        for setting, call in further_calls(q, k, v, sparsity).items() if all_methods else ():
            self._add(shape, "sla2", setting, sparsity, call)
        if peers:
            import comfy_kitchen

            call, count = sol_attn_call(q, k, v, sparsity)
            kept = sol_attn.kept_share(q, k, count)
            self._add(shape, "sol_attn", "equal share", sparsity, call, kept=kept)
            if not any(row["setting"] == "tau 1.3" and row["shape"] == shape.name for row in self.rows):
                self._add(shape, "sol_attn", "tau 1.3", None, lambda: comfy_kitchen.sol_attn(q, k, v, tau=1.3))

    def _add(self, shape, method, setting, sparsity, call, **fields):
        kernels = kernel_times(call)
        # sol_attn copies a number from the host where the last block is ragged, which no graph can hold
        graph = method == "sla2" or shape.tokens % sol_attn.BLOCK == 0
        row = {
            "part": f"sm_{self.arch}", "method": method, "setting": setting, "shape": shape.name, "tokens": shape.tokens,
            "heads": shape.heads, "sparsity": sparsity, "graph": graph, "ms": gpu_ms(call, graph),
            "host_ms": launch_ms(call),
            "launches": sum(count for _, count in kernels.values()),
            "kernels": {name: round(ms, 4) for name, (ms, _) in kernels.items()},
            "other_instructions": self._unlike(kernels) if method == "sla2" else [],
        }  # fmt: skip
        self.rows.append(row | fields)
        print(line(self.rows[-1]), flush=True)
        torch.cuda.empty_cache()

    def _unlike(self, ran):
        """Names of the kernels that ran and whose matrix instructions are not the card's own."""
        if self.imitation is None:
            return []
        return sorted({kernel.name for kernel in self.imitation.kernels if not kernel.faithful and kernel.name in ran})


def sla2_calls(q, k, v, sparsity, **options):
    """(a call with a ratio per head, a call that fits it), as the untrained mode makes them: (B, N, H, D), own key blocks kept."""
    from sla2_kernels import sla2_attention
    from sla2_kernels.fitted_attention import fitted_attention, sample_rows

    ratio = torch.linspace(0.6, 0.95, q.shape[2], device=q.device)
    rows = sample_rows(q.shape[1], 0, q.device)
    settings = {"sparsity": sparsity, "precision": "int8", "layout": "BNHD", "keep_diagonal": True, **options}
    return (
        lambda: sla2_attention(q, k, v, alpha=ratio, **settings),
        lambda: fitted_attention(q, k, v, rows=rows, **settings).out,
    )


def sol_attn_call(q, k, v, sparsity):
    """(a call of sol_attn with as many key blocks in all, its top-k count)."""
    import comfy_kitchen

    count = sol_attn.equal_count(q, k, 1 - sparsity)
    # its count rounds down, so a little more than the share of whole blocks
    ratio = (count + 0.01) / -(-q.shape[1] // sol_attn.BLOCK)
    return lambda: comfy_kitchen.sol_attn(q, k, v, topk_ratio=ratio), count


def further_calls(q, k, v, sparsity):
    """{setting: call} of the operator's other modes, on (B, N, H, D); without a router also with the queries per selection of this card."""
    from sla2_kernels import Q_BLOCK, sla2_attention
    from sla2_kernels.query_blocks import default_query_block
    from sla2_kernels.sla_v1 import sla_attention

    settings = {"sparsity": sparsity, "precision": "int8", "layout": "BNHD"}
    proj_l = torch.eye(q.shape[3], device=q.device), torch.zeros(q.shape[3], device=q.device)
    block = default_query_block(q, "int8")
    found = {
        "estimated": lambda: sla2_attention(q, k, v, keep_diagonal=True, query_block=block, **settings),
        "top-k only": lambda: sla2_attention(q, k, v, linear_branch=False, **settings),
        "SLA v1": lambda: sla_attention(q, k, v, proj_l, **settings),
    }
    if block != Q_BLOCK:
        fixed, fitting = sla2_calls(q, k, v, sparsity, query_block=block)
        found |= {f"a ratio per head, {block} queries": fixed, f"a call that fits, {block} queries": fitting}
    return found


def output_error(sparsity):
    """Relative error of the output on a few thousand tokens against the float64 definition, given the selection."""
    from sla2_kernels import select_key_blocks
    from sla2_kernels.reference import sla2_reference

    q, k, v = make_inputs(CHECKED)
    out = sla2_calls(q, k, v, sparsity)[0]()
    blocks = select_key_blocks(q, k, sparsity=sparsity, layout="BNHD", keep_diagonal=True)
    ratio = torch.linspace(0.6, 0.95, q.shape[2], device=q.device)
    expected, _ = sla2_reference(*(x.transpose(1, 2) for x in (q, k, v)), alpha=ratio, key_blocks=blocks)
    return float((out.transpose(1, 2).double() - expected).norm() / expected.norm())


def gpu_ms(call, graph):
    """Median milliseconds of ``call()``, launched by a CUDA graph or one right after the other."""
    run = graph_timer(call, REPLAYS) if graph else lambda: event_ms(call, REPLAYS)
    return statistics.median(run() for _ in range(5))


def kernel_times(call):
    """{kernel: (ms, launches)} of one call, by torch.profiler."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    ran = [event for event in profiled.key_averages() if event.self_device_time_total > 0]
    return {event.key: (event.self_device_time_total / 1000, event.count) for event in ran}


def line(row):
    """One row as a line of the log."""
    skips = "" if row["sparsity"] is None else f"skips {100 * row['sparsity']:g}%"
    start = f"{row['part']} {row['shape']:10s} {skips:10s} {row['method']:9s} {row['setting']:17s}"
    error = f" error {row['relative_error']:.4f}" if "relative_error" in row else ""
    unlike = f" other instructions: {', '.join(row['other_instructions'])}" if row["other_instructions"] else ""
    return f"{start} {row['ms']:8.3f} ms, host {row['host_ms']:.3f} ms, {row['launches']} launches{error}{unlike}"


def roofline_table(sparsities):
    """Markdown of the estimate for each card and shape: SLA2 and, in brackets, sol_attn at an equal share, ms."""
    columns = [(sheet, sparsity) for sheet in SHEETS for sparsity in sparsities]
    lines = [
        "| at least, by data sheet, ms | " + " | ".join(f"{sheet.name}, {100 * s:g}%" for sheet, s in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for shape in SHAPES.values():
        cells = [
            f"{milliseconds(sla2_work(shape, s, FORMATS), sheet):.2f} ({milliseconds(sol_work(shape, 1 - s), sheet):.2f})"
            for sheet, s in columns
        ]
        lines.append(f"| {shape.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
