"""How many bytes of memory a call of SLA2 and one of sol_attn move, in the instructions of an RTX 40, and what other cards would need for
them: an H200's memory is five times as fast as an RTX 4090's, so a time there does not show what that card waits for.

    python -m benchmarks.memory_traffic --peers FOLDER    counts and prints the table; needs Nsight Compute (ncu) and an H100 or H200

ncu runs kernel after kernel, so what runs beside each other otherwise (kernels/launch.py's lanes) does not here. The rows go into the
results file of benchmarks.consumer, in place of those of an earlier run. Without --peers there is nothing to compare with.
"""

import argparse
import csv
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from . import results
from .consumer import SHAPES, add_call_arguments, check_shapes, default_out, sla2_calls, sol_attn_call
from .consumer_imitation import imitate
from .consumer_table import TRAFFIC, traffic_markdown
from .inputs import make_inputs
from .measure import environment
from .rivals import sol_attn
from .rivals.packages import add_peer_folders

ARCH = 89
METRICS = {"dram__bytes_read.sum": "read", "dram__bytes_write.sum": "written", "gpu__time_duration.sum": "nanoseconds"}
END = "spin_kernel"  # of torch.cuda._sleep(), which stands behind each call


def main(argv=None):
    args = parse(argv)
    if args.child:
        call_each(args)
        return
    if args.peers:
        add_peer_folders(args.peers)
        sol_attn.load_compiled()  # or says what is missing, before anything is counted
    with tempfile.TemporaryDirectory() as folder:
        report, calls = Path(folder) / "ncu.csv", Path(folder) / "calls.json"
        try:
            count(args, report, calls)
            rows = joined(json.loads(calls.read_text(encoding="utf-8")), counted(report.read_text(encoding="utf-8")))
        except (subprocess.CalledProcessError, ValueError):
            print("\n".join(said(report)), file=sys.stderr)
            raise
    content = with_traffic(results.load(args.out), rows, environment("cuda"))
    results.save(args.out, content)
    print(traffic_markdown(content))


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_call_arguments(parser, ["14B-720p", "H3", "LTX-2"])
    parser.add_argument("--child", type=Path, metavar="CALLS", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    check_shapes(parser, args)
    if not torch.cuda.is_available():
        parser.error("this counts on an H100 or H200, and there is no GPU")
    if shutil.which("ncu") is None:
        parser.error("Nsight Compute's ncu is not on the PATH")
    if args.out is None:
        args.out = default_out()
    return args


def count(args, report, calls):
    """Runs call_each() under ncu; raises subprocess.CalledProcessError."""
    words = [
        "ncu", "--clock-control", "none", "--cache-control", "none", "--profile-from-start", "off",
        "--metrics", ",".join(METRICS), "--print-units", "base", "--csv", "--log-file", report,
        sys.executable, "-m", "benchmarks.memory_traffic", "--child", calls, "--shapes", ",".join(args.shapes),
        "--sparsities", ",".join(map(str, args.sparsities)), *(["--peers", args.peers] if args.peers else []),
    ]  # fmt: skip
    subprocess.run(words, check=True)  # noqa: S603  ncu and itself


def call_each(args):
    """Each call once for ncu, after calls that compile and record; writes which they were, in order."""
    imitate(ARCH)
    add_peer_folders(args.peers)
    runtime, listed = torch.cuda.cudart(), []
    for name in args.shapes:
        q, k, v = make_inputs(SHAPES[name])
        for sparsity in args.sparsities:
            calls = {"sla2": sla2_calls(q, k, v, sparsity)[0]}
            if args.peers:
                calls["sol_attn"] = sol_attn_call(q, k, v, sparsity)[0]
            for method, call in calls.items():
                for _ in range(3):
                    call()
                torch.cuda.synchronize()
                runtime.cudaProfilerStart()
                call()
                torch.cuda._sleep(1)
                torch.cuda.synchronize()
                runtime.cudaProfilerStop()
                listed.append({"method": method, "shape": name, "sparsity": sparsity})
    args.child.write_text(json.dumps(listed), encoding="utf-8")


def said(report):
    """What ncu said beside its table, lines; it writes that into the file too."""
    if not report.exists():
        return []
    return [line for line in report.read_text(encoding="utf-8").splitlines() if line.startswith("==")]


def with_traffic(content, rows, machine):
    """The content of a results file with these rows; the environment beside the other parts stays that of their run."""
    former = content["environment"]
    content = results.replace_part(content, TRAFFIC, rows, {"environment": machine})
    return content | {"environment": former or machine}


def counted(report):
    """[[{"name", "read", "written", "nanoseconds"} per kernel] per call] of ncu's CSV, in order; bytes. A kernel's launches are added up."""
    launches = {}
    lines = [line for line in report.splitlines() if line.startswith('"')]
    for line in csv.DictReader(lines):
        value = float(line["Metric Value"].replace(",", ""))
        launches.setdefault(int(line["ID"]), {"name": line["Kernel Name"][:80]})[METRICS[line["Metric Name"]]] = value
    calls = [{}]
    for number in sorted(launches):
        launch = launches[number]
        if END in launch["name"]:
            calls.append({})
            continue
        kernel = calls[-1].setdefault(launch["name"], {"name": launch["name"]} | dict.fromkeys(METRICS.values(), 0.0))
        for what in METRICS.values():
            kernel[what] += launch[what]
    return [list(kernels.values()) for kernels in calls[:-1]]


def joined(calls, of_calls):
    """Rows of a results file; raises ValueError where ncu counted another number of calls."""
    if len(calls) != len(of_calls):
        raise ValueError(f"ncu counted {len(of_calls)} calls of {len(calls)}.")
    return [{"part": TRAFFIC} | call | {"kernels": kernels} for call, kernels in zip(calls, of_calls, strict=True)]


if __name__ == "__main__":
    sys.exit(main())
