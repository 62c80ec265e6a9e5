"""Is a candidate right, and is it faster?

    python -m benchmarks.candidates                  checks the Hopper loop in the package's own pipeline, then times both
    python -m benchmarks.candidates --check          only the check
    python -m benchmarks.candidates --stages 2 3 4   times these depths of its ring

Needs an sm_90 card and Triton 3.6 or newer. Nothing is written: results that count go to benchmarks/NOTES.md.
"""

import argparse
import functools
import sys
from contextlib import contextmanager

import torch

from sla2_kernels import triton_backend

from ..inputs import SHAPES, Shape, make_inputs
from ..ours import check, sla2_method
from ..phases import kernel_times

FORMATS = {"int8": "8 bit", "16bit": "16 bit"}
# ragged last blocks; odd and even counts of key blocks, one block, and all of them
CHECKED = [(Shape(f"{tokens} tokens", 3, (1, 1, tokens)), sparsity) for tokens, sparsity in
           ((1000, 0.9), (1000, 0.8), (8250, 0.97), (2111, 0.5), (700, 0.0), (40, 0.0))]  # fmt: skip


@contextmanager
def hopper_loop(stages=None):
    """The package's Triton backend with the candidate in the place of its loop."""
    from .hopper_loop import CHANNEL_ORDER, KEY_ORDER, hopper_sparse_attention

    before = triton_backend.sparse_attention

    @functools.wraps(before)
    def replacement(q, k, v, out, work, *args, **options):
        if work.v_low is not None:
            packed = work.v_low.view(torch.uint8)
            packed.copy_(packed[:, :, CHANNEL_ORDER.to(q.device)][..., KEY_ORDER.to(q.device)])
        hopper_sparse_attention(q, k, v, out, work, *args, **options, stages=stages)

    triton_backend.sparse_attention = replacement
    try:
        yield
    finally:
        triton_backend.sparse_attention = before


def check_hopper_loop():
    """Prints the error of each case against float64; the number of cases that failed."""
    failed = 0
    for shape, sparsity in CHECKED:
        for dtype in (torch.bfloat16, torch.float16):
            for precision in FORMATS:
                for alpha in ("learned", "estimated"):
                    inputs = make_inputs(shape, dtype=dtype)
                    with hopper_loop():
                        found = check(*inputs, sparsity, precision, alpha, backend="triton")
                    failed += not found.passed
                    said = "" if found.passed else "  FAILED" + ("" if found.repeatable else ", repeats differ")
                    print(
                        f"{shape.name:>12} {sparsity:.2f} {dtype} {precision:>5} {alpha:>9}: {found.relative_error:.2e}{said}"
                    )
    return failed


def loop_ms(shape, sparsity, precision):
    """GPU milliseconds of the loop's kernel in one call of the operator."""
    run = sla2_method(sparsity, precision, "learned", "triton").prepare(*make_inputs(shape))
    return sum(ms for name, (ms, _) in kernel_times(run).items() if "sparse_attention" in name)


def time_hopper_loop(all_stages):
    print("| shape | skips | precision | package | " + " | ".join(f"{n} stages" for n in all_stages) + " |")
    for name in ("1.3B-480p", "14B-720p"):
        for sparsity in (0.97, 0.9):
            for precision in FORMATS:
                times = [loop_ms(SHAPES[name], sparsity, precision)]
                for stages in all_stages:
                    # four pairs of 16-bit key blocks do not fit the shared memory
                    fits = precision != "16bit" or stages < 4
                    with hopper_loop(stages):
                        times.append(loop_ms(SHAPES[name], sparsity, precision) if fits else float("nan"))
                cells = " | ".join(f"{ms:.3f}" for ms in times)
                print(f"| {name} | {sparsity:.0%} | {FORMATS[precision]} | {cells} |", flush=True)


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.candidates", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only the check")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3, 4], help="pairs of key blocks in flight")
    options = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        parser.error("the candidate is written for sm_90: run this on an H100 or H200.")
    if check_hopper_loop():
        sys.exit("The candidate is wrong: it is not timed.")
    if not options.check:
        time_hopper_loop(options.stages)


if __name__ == "__main__":
    main()
