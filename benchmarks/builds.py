"""The kernels of several checkouts, in turns on one GPU: what a change brings, against the build before it.

    python -m benchmarks.builds BEFORE .                           on the GPU as it is
    python -m benchmarks.builds BEFORE . --arch 89                 in an RTX 40's instructions (see consumer_imitation.py)
    python -m benchmarks.builds BEFORE . --query-block 64 --shapes LTX-2

BEFORE and . are folders that hold a sla2_kernels; all else is this checkout's. Each build runs in a process and a Triton cache of
its own, --turns times, one build after the other. Prints ms of a call with a ratio per head (medians over the turns; smallest and
largest where they differ by more than 1%), and of those of its kernels that take longest.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from . import lists

LISTED = 4  # kernels of a row
APART = 0.01  # of a time, up to which two turns agree


def main(argv=None):
    args = parse(argv)
    if args.child:
        measure(args)
        return
    found = [[] for _ in args.builds]
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.turns):
            for number, build in enumerate(args.builds):
                found[number].append(measured_apart(args, build, Path(folder) / str(number)))
    print(table([str(build) for build in args.builds], found))


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("builds", type=Path, nargs="+", metavar="FOLDER", help="a folder that holds a sla2_kernels")
    parser.add_argument("--arch", type=int, choices=[80, 86, 89], help="instructions to imitate; default: none")
    parser.add_argument(
        "--shapes", type=lists.names, default=["LTX-2", "H3", "14B-720p"], help="of benchmarks.consumer"
    )
    parser.add_argument("--sparsities", type=lists.numbers, default=[0.97, 0.9])
    parser.add_argument("--query-block", type=int, choices=[64, 128], default=128)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not args.child:
        from .consumer import check_shapes  # which loads this checkout's kernels: a child takes those of its build

        check_shapes(parser, args)
    for build in args.builds:
        if not (build / "sla2_kernels" / "__init__.py").is_file():
            parser.error(f"{build} holds no sla2_kernels: name the root of a checkout.")
    if args.turns < 1:
        parser.error(f"--turns {args.turns}: each build must run at least once.")
    if not torch.cuda.is_available():
        parser.error("this times kernels, and there is no GPU.")
    return args


def measured_apart(args, build, cache):
    """Rows of one build, from a process of its own."""
    words = [
        sys.executable, "-m", "benchmarks.builds", "--child", str(build.resolve()), "--shapes", ",".join(args.shapes),
        "--sparsities", ",".join(map(str, args.sparsities)), "--query-block", str(args.query_block),
    ]  # fmt: skip
    words += ["--arch", str(args.arch)] if args.arch else []
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    run = subprocess.run(words, cwd=root, env=environment, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603  itself
    return json.loads(run.stdout.splitlines()[-1])


def use_kernels_of(build):
    """From now on ``import sla2_kernels`` means that of this folder; before the first such import."""
    if "sla2_kernels" in sys.modules:
        raise RuntimeError("sla2_kernels has been imported already.")
    sys.path.insert(0, str(build))


def measure(args):
    """Prints one line of JSON: a list of {shape, sparsity, ms, kernels}."""
    use_kernels_of(args.builds[0])
    from . import consumer

    if args.arch:
        consumer.Imitation(consumer.CARDS[args.arch]).begin()
    rows = []
    for name in args.shapes:
        q, k, v = consumer.make_inputs(consumer.SHAPES[name])
        for sparsity in args.sparsities:
            call, _ = consumer.sla2_calls(q, k, v, sparsity, query_block=args.query_block)
            ms = consumer.gpu_ms(call, graph=True)
            kernels = {kernel: time for kernel, (time, _) in consumer.kernel_times(call).items()}
            rows.append({"shape": name, "sparsity": sparsity, "ms": ms, "kernels": kernels})
        del q, k, v, call
        torch.cuda.empty_cache()
    print(json.dumps(rows))


def table(builds, found):
    """Markdown: a row per shape and sparsity, a column per build. found: for each build the rows of each turn."""
    lines = ["| ms | " + " | ".join(builds) + " |", "|---|" + "---|" * len(builds)]
    for number, row in enumerate(found[0][0]):
        turns = [[turn[number] for turn in of_build] for of_build in found]
        cells = [_spread([one["ms"] for one in of_build]) for of_build in turns]
        lines.append(f"| {row['shape']}, {100 * row['sparsity']:g}% | " + " | ".join(cells) + " |")
        times = {}  # of each kernel, by build
        for build, of_build in enumerate(turns):
            for kernel, ms in (item for one in of_build for item in one["kernels"].items()):
                times.setdefault(kernel, [[] for _ in builds])[build].append(ms)
        longest = sorted(times, key=lambda kernel: max(map(max, filter(None, times[kernel]))), reverse=True)
        for kernel in longest[:LISTED]:
            cells = [_spread(of_build) if of_build else "-" for of_build in times[kernel]]
            lines.append(f"| {kernel} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(times):
    """The median, and the range where turns differ by more than APART of it."""
    middle, least, most = statistics.median(times), min(times), max(times)
    return f"{middle:.4g}" + (f" ({least:.4g} to {most:.4g})" if most - least > APART * middle else "")


if __name__ == "__main__":
    main()
