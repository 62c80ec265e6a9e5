"""Whole-operation forward time of sla2_attention beside its peers, in one run; writes benchmarks/results/<card>.json.

    python -m benchmarks.forward                       all parts, on a GPU (about 8 minutes on an H100)
    python -m benchmarks.forward --parts shapes        one part; its rows in the file are replaced
    python -m benchmarks.forward --parts branches      without the linear branch (top-k only) beside the whole operator
    python -m benchmarks.forward --quick               a minute: Wan 1.3B at 480p, skips 97%
    python -m benchmarks.forward --phases 14B-720p     time of each kernel against the card's ceilings (--alphas none:
                                                         without the linear branch)
    python -m benchmarks.forward --table               the README's table from the file, nothing is measured
    python -m benchmarks.forward --plot docs           length.svg and sparsity.svg from the file into a folder

Each setting of ours is first checked against the float64 definition and for bitwise equal repeats; a row that fails is
marked and left out of table and plots. Times are medians of triton.testing.do_bench.
"""

import argparse
import sys
from pathlib import Path

import torch

from . import results
from .breakdown import print_phases
from .inputs import KINDS, find_shape, make_inputs, shape_of_length
from .measure import environment, is_gpu, launch_ms, measure_ceilings, median_ms, peak_bytes, use_device
from .ours import ALPHAS, NAME, NO_LINEAR_BRANCH, PRECISIONS, check, sla2_method
from .plot import part_plot
from .rivals.packages import add_peer_folders, find_peers
from .table import label, markdown

PARTS = ("shapes", "data", "length", "sparsity", "branches")
LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
SWEPT_SPARSITIES = (0.5, 0.8, 0.85, 0.9, 0.95, 0.97, 0.98)


def main(argv=None):
    args = parse(argv)
    path = args.out
    if args.table or args.plot:
        content = results.load(path)
        if args.table:
            print(markdown(content, args.part_of_table))
        if args.plot:
            write_plots(content, Path(args.plot))
        return
    use_device(args.device)
    add_peer_folders(args.peers)
    if args.phases:
        for precision in args.precisions:
            print_phases(
                find_shape(args.phases),
                args.sparsities[0],
                precision,
                args.device,
                alpha=args.alphas[0],
                backend=args.backend,
            )
        return
    bench = Bench(args)
    for part in args.parts:
        bench.measure(part)
    for part in ("shapes", "branches"):
        if part in args.parts:
            print("\n" + markdown(results.load(path), part))


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", type=_words(PARTS), default=list(PARTS), help="comma-separated, of: " + ", ".join(PARTS)
    )
    parser.add_argument("--shapes", type=lambda text: text.split(","), default=["1.3B-480p", "14B-720p"])
    parser.add_argument("--sparsities", type=_numbers, default=[0.97, 0.95, 0.9])
    parser.add_argument("--precisions", type=_words(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--alphas", type=_words((*ALPHAS, NO_LINEAR_BRANCH)), default=list(ALPHAS))
    parser.add_argument("--lengths", type=lambda text: [int(n) for n in text.split(",")], default=list(LENGTHS))
    parser.add_argument("--peers", help="folder with the peers' packages (see benchmarks/rivals/packages.py)")
    parser.add_argument("--no-peers", action="store_true", help="time SLA2 and dense attention only")
    parser.add_argument("--backend", choices=("auto", "triton", "torch"), default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="results file; default benchmarks/results/<card>.json")
    parser.add_argument("--quick", action="store_true", help="one shape, one sparsity")
    parser.add_argument("--phases", metavar="SHAPE", help="profile one shape's phases instead")
    parser.add_argument("--table", action="store_true", help="print the markdown table of the results file")
    parser.add_argument("--part-of-table", default="shapes", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--plot", metavar="FOLDER", help="write the plots of the results file")
    args = parser.parse_args(argv)
    if args.quick:
        args.parts, args.shapes, args.sparsities = ["shapes"], args.shapes[:1], args.sparsities[:1]
    if args.out is None:
        if (args.table or args.plot) and not is_gpu(args.device):
            measured = sorted(results.RESULTS.glob("*.json"))
            measured = [file for file in measured if "environment" in results.load(file)]
            if not measured:
                parser.error(f"no results in {results.RESULTS}: name a file with --out, or measure first")
            args.out = measured[0]
        else:
            args.out = results.card_file(environment(args.device)["card"])
    return args


def _numbers(text):
    return [float(word) for word in text.split(",")]


def _words(allowed):
    def read(text):
        words = text.split(",")
        unknown = [word for word in words if word not in allowed]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(allowed)}")
        return words

    return read


class Bench:
    """Measures parts and writes down what is there after each shape."""

    def __init__(self, args):
        self.args = args
        self.device = args.device
        self.about = {"environment": environment(args.device)}
        print(", ".join(f"{name} {value}" for name, value in self.about["environment"].items()), flush=True)
        ceilings = measure_ceilings(args.device)
        if ceilings is not None:
            self.about["ceilings"] = {"copy_bytes_per_second": ceilings.copy, "matmul_flops": ceilings.matmul}
            rates = ", ".join(f"{name} matmul {rate / 1e12:.0f} TFLOP/s" for name, rate in ceilings.matmul.items())
            print(f"copy {ceilings.copy / 1e9:.0f} GB/s, {rates}", flush=True)
        self.rows = []

    def measure(self, part):
        """One part: its rows replace those of an earlier run in the results file."""
        self.rows, self.part = [], part
        self.about["absent"] = {}
        getattr(self, f"_{part}")()

    def _save(self):
        content = results.load(self.args.out)
        results.save(self.args.out, results.replace_part(content, self.part, self.rows, dict(self.about)))

    def _methods(self, sparsities, *, precisions=None, alphas=None, dense=True):
        if not self.args.no_peers and is_gpu(self.device):
            peers, self.about["absent"] = find_peers(sparsities)
        elif is_gpu(self.device):
            peers, _ = find_peers(())
        else:
            peers, self.about["absent"] = [], {"every peer": "they need a GPU"}
        ours = self._ours(sparsities, precisions or self.args.precisions, alphas or self.args.alphas)
        return [m for m in peers if dense or not m.is_dense] + ours

    def _ours(self, sparsities, precisions, alphas):
        return [
            sla2_method(sparsity, precision, alpha, self.args.backend)
            for precision in precisions
            for alpha in alphas
            for sparsity in sparsities
        ]

    def _shapes(self):
        methods = self._methods(self.args.sparsities)
        for name in self.args.shapes:
            self._time(find_shape(name), methods)

    def _data(self):
        methods = self._methods(self.args.sparsities[:1], dense=False)
        for name in self.args.shapes:
            for kind in KINDS:
                self._time(find_shape(name), methods, kind)

    def _length(self):
        methods = self._methods(self.args.sparsities[:1], precisions=self.args.precisions[1:2] or self.args.precisions)
        for tokens in self.args.lengths:
            self._time(shape_of_length(tokens), methods)
        self._say_crossover()

    def _sparsity(self):
        methods = self._methods(SWEPT_SPARSITIES, precisions=self.args.precisions[1:2] or self.args.precisions)
        self._time(find_shape(self.args.shapes[0]), methods)

    def _branches(self):
        alphas = dict.fromkeys([*self.args.alphas, NO_LINEAR_BRANCH])
        methods = self._ours(self.args.sparsities, self.args.precisions, alphas)
        for name in self.args.shapes:
            self._time(find_shape(name), methods)

    def _time(self, shape, methods, kind="random"):
        q, k, v = make_inputs(shape, kind, device=self.device)
        for method in methods:
            row = self._row(method, shape, kind, q)
            try:
                if method.name == NAME:
                    slack = 1.0 if kind == "random" else 1.5
                    checked = check(q, k, v, method.sparsity, backend=self.args.backend, slack=slack, **_asked(method))
                    row |= checked.as_fields()
                run = method.prepare(q, k, v)
                row["ms"] = median_ms(run, self.device)
                row["peak_bytes"] = peak_bytes(run, self.device)
                if method.name == NAME and is_gpu(self.device):
                    row["host_ms"] = launch_ms(run)
            except (RuntimeError, ValueError, TypeError, AssertionError, ImportError) as error:
                # written down and shown: a peer that refuses a shape must not end the run
                row |= {"ms": None, "failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
            self.rows.append(row)
            print(line(row), flush=True)
            if is_gpu(self.device):
                torch.cuda.empty_cache()
        self._save()

    def _row(self, method, shape, kind, q):
        return {
            "part": self.part,
            "method": method.name,
            "shape": shape.name,
            "tokens": shape.tokens,
            "heads": shape.heads,
            "data": kind,
            "sparsity": method.sparsity,
            "percent": None if method.sparsity is None else round(100 * method.sparsity, 2),
            "precision": None,
            "tensor_bytes": q.numel() * q.element_size(),
            **method.fields,
            "ms": None,
            "peak_bytes": None,
        }

    def _say_crossover(self):
        """Fewest tokens from which on SLA2 with an estimated ratio beats the fastest dense method of this run."""
        found = None
        for tokens in sorted(self.args.lengths, reverse=True):
            at = [row for row in results.timed(self.rows) if row["tokens"] == tokens]
            dense = [row["ms"] for row in at if row["sparsity"] is None]
            ours = [row["ms"] for row in at if row["method"] == NAME and row["alpha"] == self.args.alphas[-1]]
            if not dense or not ours or min(ours) >= min(dense):
                break
            found = tokens
        print(f"SLA2 is faster than every dense method from {found} tokens on" if found else "no crossover in this run")


def _asked(method):
    return {name: method.fields[name] for name in ("precision", "alpha")}


def line(row):
    """One row as a line of the log."""
    name = label(row).replace("*", "")
    skips = "dense" if row["sparsity"] is None else f"skips {100 * row['sparsity']:g}%"
    start = f"{row['shape']:14s} {row['data']:9s} {skips:10s} {name:40s}"
    if row.get("failed"):
        return f"{start} FAILED {row['failed']}"
    parts = [f"{row['ms']:9.3f} ms"]
    if row["peak_bytes"] is not None:
        parts.append(f"{row['peak_bytes'] / row['tensor_bytes']:5.2f} x Q memory")
    if "host_ms" in row:
        parts.append(f"host {row['host_ms']:.3f} ms")
    if "passed" in row:
        state = "ok" if row["passed"] else "WRONG" if row["repeatable"] else "NOT REPEATABLE"
        parts.append(f"error {row['relative_error']:.4f}, other blocks {row['selection_error']:.5f} {state}")
    return " ".join([start, *parts])


def write_plots(content, folder):
    """length.svg and sparsity.svg of the parts that were measured."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("length", "sparsity"):
        svg = part_plot(content, part)
        if svg:
            (folder / f"{part}.svg").write_text(svg, encoding="utf-8")
            print(folder / f"{part}.svg")


if __name__ == "__main__":
    sys.exit(main())
