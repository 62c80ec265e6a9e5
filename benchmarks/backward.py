"""Forward and backward time of sla2_attention beside dense FlashAttention-2 and SLA's own Triton backward, in one run.

    python -m benchmarks.backward --peers FOLDER         Wan 1.3B at 480p and 14B at 720p, on a GPU (about 4 minutes)
    python -m benchmarks.backward --parts check          gradients against float64 only
    python -m benchmarks.backward --parts phases         time of each kernel of a backward pass
    python -m benchmarks.backward --parts sweep          other tile sizes than the shipped ones, one kernel at a time
    python -m benchmarks.backward --arch 89 --parts sweep --shapes 14B-720p    a few tiles for mma.sync, at most a minute
    python -m benchmarks.backward --arch 89              in an RTX 40's instructions, on an H100 (consumer_imitation.py)
    TRITON_INTERPRET=1 python -m benchmarks.backward --shapes tiny --device cpu --parts check,time

Times are medians of triton.testing.do_bench over forward plus backward; "kept" is what the forward pass leaves in memory
for the backward pass, beside q, k, v and the output themselves. Rows go to benchmarks/results/<card>.json; with --arch to
backward-<card>.json, as part "backward sm_<arch>". There FlashAttention-2 is torch's own, compiled for the H100.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend

from sla2_kernels import Q_BLOCK, select_key_blocks, sla2_attention
from sla2_kernels.kernels.backward_configs import BackwardConfig, LinearConfig, TileConfig
from sla2_kernels.reference import sla2_reference
from sla2_kernels.router import block_count

from . import lists, results
from .consumer_imitation import ASSEMBLED, imitate
from .inputs import find_shape, make_inputs
from .measure import environment, is_gpu, median_ms, use_device
from .ours import weights_for
from .rivals.packages import BASELINE, Method, add_peer_folders, sdpa

PARTS = ("check", "time", "phases", "sweep")
KERNELS = {
    "queries": ("_query_gradient",),
    "keys": ("_key_gradient",),
    "linear": ("_linear_queries", "_linear_sums", "_linear_keys"),
}
# for mma.sync, all within 99 KB of shared memory; the shipped ones of RTX cards first
MMA_TILES = {
    "queries": [TileConfig(*tile) for tile in ((128, 32, 8, 3), (128, 32, 8, 2), (32, 64, 4, 1), (64, 64, 8, 2))],
    "keys": [TileConfig(*tile) for tile in ((32, 64, 4, 2), (16, 64, 4, 2), (32, 64, 4, 3))],
    "linear": [
        LinearConfig(*tile) for tile in ((64, 64, 64, 4, 2), (32, 32, 64, 4, 2), (64, 64, 32, 4, 2), (64, 64, 64, 8, 2))
    ],
}
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-4}


def main(argv=None):
    args = parse(argv)
    use_device(args.device)
    imitation = imitate(args.arch) if args.arch else None
    add_peer_folders(args.peers)
    print(", ".join(f"{name} {value}" for name, value in environment(args.device).items()), flush=True)
    failed = False
    for name in args.shapes:
        shape = find_shape(name)
        dtype = torch.bfloat16 if is_gpu(args.device) else torch.float32
        q, k, v = make_inputs(shape, args.data, device=args.device, dtype=dtype)
        for sparsity in args.sparsities if "check" in args.parts else ():
            failed |= not check(q, k, v, shape, sparsity)
        if "time" in args.parts:
            time_methods(q, k, v, shape, args, imitation)
        if "phases" in args.parts:
            print_phases(q, k, v, args.sparsities[0])
        if "sweep" in args.parts:
            sweep(q, k, v, args, imitation)
    if imitation is not None:
        print(kernels_table(imitation.kernels))
    return 1 if failed else 0


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=_parts, default=["check", "time", "phases"], help=", ".join(PARTS))
    parser.add_argument("--shapes", type=lists.names, default=["1.3B-480p", "14B-720p"])
    parser.add_argument("--sparsities", type=lists.numbers, default=[0.97, 0.9])
    parser.add_argument("--precisions", type=lists.names, default=["int8", "16bit"])
    parser.add_argument("--data", default="random", help="random, local or clustered (benchmarks/inputs.py)")
    parser.add_argument("--peers", help="folder with the peers' packages (see benchmarks/rivals/packages.py)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--arch", type=int, choices=ASSEMBLED, help="in this card's instructions, as benchmarks.consumer"
    )
    parser.add_argument("--out", type=Path, help="results file; default benchmarks/results/[backward-]<card>.json")
    args = parser.parse_args(argv)
    if args.arch and not is_gpu(args.device):
        parser.error(f"--arch {args.arch} compiles for an H100 or H200 at hand, and the device is {args.device}")
    return args


def _parts(text):
    parts = text.split(",")
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(PARTS)}")
    return parts


def leaves_of(*tensors):
    return [x.detach().requires_grad_() for x in tensors]


def check(q, k, v, shape, sparsity, *, heads=2, blocks=4):
    """Gradients of a few heads against float64 autograd of the definition; prints one line, returns whether they hold.

    The output's gradient is not zero on a few query blocks only (the ragged last one among them), so that the definition
    needs just those; a second run on the full gradient must repeat bit by bit.
    """
    generator = torch.Generator().manual_seed(0)
    chosen_heads = torch.randperm(q.shape[2], generator=generator)[:heads].tolist()
    query_blocks = block_count(q.shape[1], Q_BLOCK)
    chosen = sorted({query_blocks - 1, *torch.randperm(query_blocks, generator=generator)[:blocks].tolist()})
    rows = torch.cat([torch.arange(i * Q_BLOCK, min((i + 1) * Q_BLOCK, q.shape[1])) for i in chosen]).to(q.device)
    weights = weights_for("learned", q.shape[2], q.shape[3], q.device)
    grad = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    grad[:, rows] = torch.randn(q.shape[0], len(rows), *q.shape[2:], generator=generator).to(q)
    selected = select_key_blocks(
        q, k, weights.proj_q, weights.proj_k, sparsity=sparsity, layout="BNHD", backend="triton"
    )

    def ours(grad):
        leaves = leaves_of(q, k, v, weights.alpha)
        out = sla2_attention(
            *leaves[:3], alpha=leaves[3], key_blocks=selected, precision="16bit", layout="BNHD", backend="triton"
        )
        return torch.autograd.grad(out, leaves, grad)

    found, worst = ours(grad), dict.fromkeys(("dq", "dk", "dv", "dalpha"), 0.0)
    for head in chosen_heads:
        index = slice(head, head + 1)
        leaves = leaves_of(*(x[:, :, index].transpose(1, 2).double() for x in (q, k, v)), weights.alpha[index].double())
        out, _ = sla2_reference(*leaves[:3], alpha=leaves[3], key_blocks=selected[:, index], query_blocks=chosen)
        expected = torch.autograd.grad(out, leaves, grad[:, rows][:, :, index].transpose(1, 2).double())
        mine = [x[:, :, index].transpose(1, 2).double() for x in found[:3]] + [found[3][index].double()]
        for name, a, b in zip(worst, mine, expected, strict=True):
            worst[name] = max(worst[name], ((a - b).norm() / b.norm()).item())
    full = torch.randn(q.shape, generator=generator).to(q)
    repeatable = all(torch.equal(a, b) for a, b in zip(ours(full), ours(full), strict=True))
    passed = repeatable and max(worst.values()) < TOLERANCE[q.dtype]
    errors = "  ".join(f"{name} {value:.2e}" for name, value in worst.items())
    state = "ok" if passed else "WRONG" if repeatable else "NOT REPEATABLE"
    print(f"{shape.name:12s} skips {100 * sparsity:g}%  gradients against float64: {errors}  {state}", flush=True)
    return passed


def sla2_method(sparsity, precision):
    """prepare(q, k, v) -> (function of no arguments that returns the output, the leaves of its graph)."""

    def prepare(q, k, v):
        weights = weights_for("learned", q.shape[2], q.shape[3], q.device)
        leaves = leaves_of(q, k, v, weights.alpha)

        def run():
            tensors = *leaves[:3], weights.proj_q, weights.proj_k, leaves[3]
            return sla2_attention(*tensors, sparsity=sparsity, precision=precision, layout="BNHD", backend="triton")

        return run, leaves

    return Method("sla2", prepare, sparsity, {"precision": precision})


def _flash(q, k, v):
    leaves = leaves_of(*(x.transpose(1, 2).contiguous() for x in (q, k, v)))
    return _with_leaves(sdpa(SDPBackend.FLASH_ATTENTION), leaves)


def _with_leaves(prepare, leaves):
    # heads-first tensors pass through the transposition and contiguous() of sdpa() unchanged, leaves included
    return prepare(*(x.transpose(1, 2) for x in leaves)), leaves


def _sla_method(sparsity):
    import sparse_linear_attention

    def prepare(q, k, v):
        leaves = leaves_of(*(x.transpose(1, 2).contiguous() for x in (q, k, v)))
        layer = sparse_linear_attention.SparseLinearAttention(q.shape[-1], 1 - sparsity, BLKQ=128, BLKK=64).to(q.device)
        return lambda: layer(*leaves), leaves + list(layer.parameters())

    return Method("SLA (thu-ml/SLA main)", prepare, sparsity)


def methods_for(args):
    methods = []
    if is_gpu(args.device):
        methods.append(Method(BASELINE, _flash))
        try:
            methods += [_sla_method(sparsity) for sparsity in args.sparsities]
        except ImportError as error:
            print(f"SLA (thu-ml/SLA main) is not here: {error}")
    return methods + [sla2_method(s, p) for s in args.sparsities for p in args.precisions]


def time_methods(q, k, v, shape, args, imitation=None):
    """Prints and writes down one row per method. imitation: an Imitation that began, whose kernels are written down too."""
    part = f"backward sm_{args.arch}" if args.arch else "backward"
    rows, baseline = [], None
    for method in methods_for(args):
        where = {"shape": shape.name, "tokens": shape.tokens, "heads": shape.heads, "data": args.data}
        row = {"part": part, "method": method.name, **where}
        row |= {"sparsity": method.sparsity, "precision": None, **method.fields}
        try:
            row |= measure(method, q, k, v, args.device)
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            # written down and shown: a peer that refuses a shape must not end the run
            row |= {"ms": None, "failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        if method.name == BASELINE:
            baseline = row["ms"]
        rows.append(row)
        print(line(row, baseline), flush=True)
    about = {"environment": environment(args.device)}
    path = args.out or results.card_file(about["environment"]["card"])
    if imitation is not None:
        about["kernels"] = [vars(kernel) for kernel in imitation.kernels]
        path = args.out or path.with_name(f"backward-{path.name}")
    content = results.load(path)
    old = [r for r in content["rows"] if r["part"] == part and r["shape"] != shape.name]
    results.save(path, results.replace_part(content, part, old + rows, about))


def measure(method, q, k, v, device):
    """{"ms": forward plus backward, "forward_ms", "kept_bytes", "peak_bytes"}; bytes are None on the CPU."""
    run, leaves = method.prepare(q, k, v)
    grad = torch.randn_like(run())

    def both():
        return torch.autograd.grad(run(), leaves, grad, allow_unused=True)

    found = {
        "forward_ms": median_ms(run, device),
        "ms": median_ms(both, device),
        "kept_bytes": None,
        "peak_bytes": None,
    }
    if is_gpu(device):
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        out = run()
        torch.cuda.synchronize(device)
        found["kept_bytes"] = torch.cuda.memory_allocated(device) - before - out.untyped_storage().nbytes()
        del out
        torch.cuda.reset_peak_memory_stats(device)
        both()
        torch.cuda.synchronize(device)
        found["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before
    found["tensor_bytes"] = q.numel() * q.element_size()
    return found


def line(row, baseline):
    skips = "dense" if row["sparsity"] is None else f"skips {100 * row['sparsity']:g}%"
    start = f"{row['shape']:12s} {skips:10s} {row['method']} {row['precision'] or '':6s}"
    if row["ms"] is None:
        return f"{start} FAILED {row['failed']}"
    parts = [f"{start:52s} forward {row['forward_ms']:8.3f} ms, with backward {row['ms']:8.3f} ms"]
    if baseline is not None:
        parts.append(f"{baseline / row['ms']:.1f}x")
    if row["kept_bytes"] is not None:
        parts.append(
            f"kept {row['kept_bytes'] / row['tensor_bytes']:.2f}, peak {row['peak_bytes'] / row['tensor_bytes']:.2f} x Q"
        )
    return " ".join(parts)


def kernels_table(kernels):
    """What the card imitated has of each consumer_imitation.Kernel; * marks other matrix instructions on the H100."""
    lines = ["| kernel | warps | registers | bytes of stack | shared KB | programs |", "|---" * 6 + "|"]
    for kernel in kernels:
        name = kernel.name + "*" * (not kernel.faithful)
        numbers = (kernel.warps, kernel.registers, kernel.stack, f"{kernel.shared / 1024:.1f}", kernel.programs)
        lines.append(f"| {name} | {' | '.join(map(str, numbers))} |")
    return "\n".join(lines)


def _backward_call(q, k, v, sparsity):
    """A function that runs the backward operator alone."""
    weights = weights_for("learned", q.shape[2], q.shape[3], q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    selected = select_key_blocks(q, k, weights.proj_q, weights.proj_k, sparsity=sparsity, backend="triton")
    ratio = weights.alpha[None, :, None].expand(q.shape[:3]).contiguous()
    grad = torch.randn_like(q)
    return lambda: torch.ops.sla2.attention_backward(grad, q, k, v, selected, ratio, True, q.shape[-1] ** -0.5)


def kernel_times(run, calls=5):
    """{kernel: (ms, launches) of one run()}, over some calls after a first; needs a GPU."""
    from torch.profiler import ProfilerActivity, profile

    run()
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    return {e.key: (e.self_device_time_total / (1000 * calls), e.count // calls) for e in record.key_averages()}


def print_phases(q, k, v, sparsity):
    """Time of each kernel of one backward pass, largest first; needs a GPU."""
    times = kernel_times(_backward_call(q, k, v, sparsity))
    print(f"backward kernels at {q.shape[1]} tokens, skips {100 * sparsity:g}%:")
    for name, (ms, count) in sorted(times.items(), key=lambda item: -item[1][0])[:16]:
        print(f"  {ms:8.3f} ms  {count:3d} x {name[:90]}")


def sweep(q, k, v, args, imitation=None):
    """Time of the kernels that other tiles than the shipped ones change, one part of BackwardConfig at a time; needs a GPU.

    In another card's instructions MMA_TILES, otherwise many for Triton's walks, on Hopper too. imitation: as in time_methods.
    """
    from triton.errors import TritonError

    from sla2_kernels import triton_backward

    shipped = triton_backward.backward_config
    triton_backward.takes_hopper_walks = lambda *_: False
    run = _backward_call(q, k, v, args.sparsities[0])
    print(f"shipped tiles: {median_ms(run, args.device, least_ms=40):.3f} ms", flush=True)
    grid = [TileConfig(r, c, w, s) for r in (64, 128) for c in (32, 64) for w in (4, 8) for s in (1, 2, 3)]
    for part, tiles in (MMA_TILES if imitation else {"queries": grid, "keys": grid}).items():
        for tile in tiles:

            def config(*facts, part=part, tile=tile) -> BackwardConfig:
                return replace(shipped(*facts), **{part: tile})

            triton_backward.backward_config = config
            try:
                print(f"  {part} {tile}: {_times_line(kernel_times(run, calls=3), part)}", flush=True)
            except (RuntimeError, ValueError, TritonError) as error:
                # too much shared memory or too many registers: that is what the sweep is to find out
                print(f"  {part} {tile}: {str(error).splitlines()[0][:80]}", flush=True)
            finally:
                triton_backward.backward_config = shipped


def _times_line(times, part):
    found = {name: times[name][0] for name in KERNELS[part]}
    return f"{sum(found.values()):7.3f} ms: " + ", ".join(f"{name} {ms:.3f}" for name, ms in found.items())


if __name__ == "__main__":
    sys.exit(main())
