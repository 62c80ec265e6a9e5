"""sla2 doctor: what runs on this machine, to paste into an issue. Needs this folder and PyTorch, no ComfyUI.

    python -m tooling.doctor            in the pack's folder
    python tooling/doctor.py            from anywhere, also with a portable ComfyUI's python_embeded
    ... --first-run                     with an empty cache of kernels: how long the first calls of a new install take

On a card it times one attention call of what people run: PyTorch's dense attention, ComfyUI's own sparse attention (sol_attn of
comfy-kitchen) where it is installed, and SLA2 without a router. The line that begins with "paste:" says all of it.

Exits with 1 where the kernels and the reference disagree, or an attention call fails.
"""

import argparse
import importlib.metadata
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # started as a file: the pack's folder is not on the path, and python_embeded adds no other
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from sla2_kernels import default_precision, reference, select_key_blocks, sla2_attention, unsupported_reason  # noqa: E402
from sla2_kernels.fitted_attention import fitted_attention, sample_rows  # noqa: E402
from sla2_kernels.kernel_failures import failure_in_a_line, kernel_failure_remedy  # noqa: E402
from sla2_kernels.loops import watch_loops  # noqa: E402
from sla2_kernels.support import PRECISIONS  # noqa: E402

# largest relative error, |out - reference| / |reference|, that is rounding and no mistake: an H100 has 0.002, 0.031, 0.044
MAX_ERROR = {"16bit": 0.01, "int8": 0.06, "fp8": 0.09}
SPARSITY = 0.9
BENCHMARK_S = 2.5  # per method and shape
# device type -> [(what, tokens, heads, dtype)]; the heads have 128 features
BENCHMARK = {
    "cuda": [
        ("Wan 1.3B 480p", 32_760, 12, torch.bfloat16),
        ("Wan 14B 480p", 32_760, 40, torch.bfloat16),
        ("LTX-2 720p", 14_080, 32, torch.bfloat16),
        ("MiniMax H3 768p", 36_960, 56, torch.bfloat16),
    ],
    "cpu": [("a short video", 2_048, 2, torch.float32)],
}
SOL_TAU, SOL_EXTRA = 1.3, 256  # defaults of ComfyUI's node


def version_of(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def pack_version():
    return re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]


def comfyui_version():
    """Of the ComfyUI that this pack is installed in, or why it is not known."""
    if ROOT.parent.name != "custom_nodes":
        return "not beside this pack"
    file = ROOT.parents[1] / "comfyui_version.py"
    if not file.is_file():
        return "older than 0.3, or moved"
    return re.search(r'"(.+)"', file.read_text(encoding="utf-8"))[1]


def environment():
    """[(name, value)]: versions and cards."""
    triton = version_of("triton-windows" if sys.platform == "win32" else "triton")
    build = (
        torch.version.cuda
        and f"CUDA {torch.version.cuda}"
        or torch.version.hip
        and f"ROCm {torch.version.hip}"
        or "CPU"
    )
    rows = [
        ("sla2-attention", pack_version()),
        ("ComfyUI", comfyui_version()),
        ("Python", f"{platform.python_version()} on {platform.platform()}"),
        ("PyTorch", f"{torch.__version__}, built for {build}"),
        ("Triton", triton),
        ("safetensors, numpy", f"{version_of('safetensors')}, {version_of('numpy')}"),
    ]
    interesting = {name: value for name, value in os.environ.items() if name.startswith(("SLA2_", "TRITON_"))}
    if interesting:
        rows.append(("environment", ", ".join(f"{name}={value}" for name, value in sorted(interesting.items()))))
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        rows.append((f"card {index}", f"{card.name}, sm_{card.major}{card.minor}, {card.total_memory / 2**30:.0f} GiB"))
    if not torch.cuda.device_count():
        rows.append(("card", "none that PyTorch can use"))
    return rows


def inputs(device, tokens, heads, dtype):
    generator = torch.Generator().manual_seed(2602)
    return [torch.randn(1, heads, tokens, 128, generator=generator).to(device, dtype) for _ in range(3)]


def self_test(device, precision):
    """(relative error of the operator against the float64 definition at a length that no block divides, Loop taken)."""
    q, k, v = inputs(device, 1000, 2, torch.bfloat16 if device.type == "cuda" else torch.float32)
    blocks = select_key_blocks(q, k, sparsity=0.75)
    with watch_loops() as loops:
        out = sla2_attention(q, k, v, sparsity=0.75, precision=precision, key_blocks=blocks)
    expected, _ = reference.sla2_reference(q, k, v, sparsity=0.75, key_blocks=blocks)
    return ((out.double() - expected).norm() / expected.norm()).item(), loops[-1] if loops else None


def median_ms(call, device, seconds):
    """Median milliseconds of a call after one to warm up; at least one, as many as fit into ``seconds``."""
    times, call_ends = [], time.perf_counter() + seconds
    call()
    while not times or time.perf_counter() < call_ends:
        wait(device)
        begun = time.perf_counter()
        call()
        wait(device)
        times.append(1000 * (time.perf_counter() - begun))
    return statistics.median(times)


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sol_attn(device):
    """(comfy-kitchen's sol_attn with the defaults of ComfyUI's node, None), or (None, why it is not timed)."""
    try:
        import comfy_kitchen
    except ImportError as missing:
        return None, f"comfy-kitchen cannot be imported: {missing}"
    if not hasattr(comfy_kitchen, "sol_attn_is_available"):
        return None, f"comfy-kitchen {version_of('comfy-kitchen')} has none"
    if not comfy_kitchen.sol_attn_is_available(device):
        return None, "comfy-kitchen's compiled sol_attn does not run on this device"
    return lambda q, k, v: comfy_kitchen.sol_attn(q, k, v, tau=SOL_TAU, token_aug=SOL_EXTRA), None


def methods(device):
    """{name: attend(q, k, v)} of (1, N, H, 128) tensors: what is timed on a device."""
    precision = default_precision(device)

    def dense(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))

    def sla2(q, k, v):
        rows = sample_rows(q.shape[1], 0, device)
        return fitted_attention(q, k, v, rows=rows, sparsity=SPARSITY, precision=precision, layout="BNHD").out

    core, _ = sol_attn(device) if device.type == "cuda" else (None, None)
    return {"dense": dense} | ({"sol_attn": core} if core else {}) | {"SLA2": sla2}


def first_calls(device):
    """Sentence: seconds of this process's first calls at two lengths, before anything else ran; kernels are compiled in them."""
    shapes, said = BENCHMARK[device.type][-2:], []
    for what, tokens, heads, dtype in reversed(shapes):
        q, k, v = (x.transpose(1, 2).contiguous() for x in inputs(device, tokens, heads, dtype))
        begun = time.perf_counter()
        methods(device)["SLA2"](q, k, v)
        wait(device)
        said.append(f"{time.perf_counter() - begun:.2f} s at {what}'s shape")
    return f"first call of SLA2: {', then '.join(said)}"


def time_shape(device, tokens, heads, dtype):
    """{name: (median milliseconds, bytes taken beside the inputs or None)}, or the exception of one that failed."""
    q, k, v = (x.transpose(1, 2).contiguous() for x in inputs(device, tokens, heads, dtype))
    found = {}
    for name, attend in methods(device).items():
        try:
            found[name] = time_method(device, lambda attend=attend: attend(q, k, v))
        except (RuntimeError, ValueError, TypeError) as failure:  # memory, or what sol_attn refuses
            found[name] = failure
    return found


def time_method(device, call):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    milliseconds = median_ms(call, device, BENCHMARK_S / 2)
    return milliseconds, torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None


def benchmark(device):
    """[(what, tokens, heads, time_shape())] of what people run, on random numbers."""
    shapes = BENCHMARK[device.type]
    return [(what, tokens, heads, time_shape(device, tokens, heads, dtype)) for what, tokens, heads, dtype in shapes]


def benchmark_lines(device, rows):
    """What was timed, a line per shape."""
    lines = [
        f"one attention call of 128 features per head; SLA2 skips {SPARSITY:.0%} in {default_precision(device)} without a router, "
        f"its ratio fitted in the call"
    ]
    for what, tokens, heads, found in rows:
        lines.append(f"{what}: {tokens} tokens, {heads} heads: {', '.join(in_words(name, found) for name in found)}")
    if device.type == "cuda" and (reason := sol_attn(device)[1]):
        lines.append(f"ComfyUI's own sparse attention is not timed: {reason}")
    return lines


def in_words(name, found):
    """ "SLA2 4.1 ms (3.0x as fast as dense, 1.4x as sol_attn; 0.21 GiB)"."""
    if isinstance(found[name], Exception):
        return f"{name} failed ({failure_in_a_line(found[name])})"
    mine, peak = found[name]
    others = [other for other in found if other != name and not isinstance(found[other], Exception)]
    faster = [f"{found[other][0] / mine:.2f}x as fast as {other}" for other in others if name == "SLA2"]
    memory = [] if peak is None else [f"{peak / 2**30:.2f} GiB"]
    more = "; ".join([", ".join(faster), *memory] if faster else memory)
    return f"{name} {mine:.2f} ms" + (f" ({more})" if more else "")


def paste_line(device, rows, errors):
    """Everything that was measured on a device as one line. errors: {precision: relative error of the self-test}."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    parts = [card, f"torch {torch.__version__}", f"triton {version_of('triton')}", f"sla2 {pack_version()}"]
    parts += [f"error {', '.join(f'{name} {error:.4f}' for name, error in errors.items())}"]
    for what, _, _, found in rows:
        times = [f"{name} {'-' if isinstance(one, Exception) else f'{one[0]:.2f}'}" for name, one in found.items()]
        parts.append(f"{what}: {' / '.join(times)} ms")
    return f"paste: {' | '.join(parts)}"


def said_of(failure):
    """A failed call in a line, with what helps; raises it again where it is none of the kernels'."""
    remedy = kernel_failure_remedy(failure)
    if remedy is None and not isinstance(failure, (RuntimeError, ValueError)):
        raise failure
    return failure_in_a_line(failure) + (f"; {remedy}" if remedy else "")


def check(device, say):
    """Fast path, self-test and benchmark of a device. True where all is well; what is not available is no fault."""
    healthy, errors = True, {}
    if device.type == "cuda" and not unsupported_reason(device, torch.bfloat16, 128, default_precision(device)):
        try:
            say(first_calls(device))
        except Exception as failure:
            say(f"first call of SLA2 FAILED: {said_of(failure)}")
            healthy = False
    for precision in PRECISIONS:
        reason = unsupported_reason(device, torch.bfloat16, 128, precision)
        if device.type == "cpu" and precision != "16bit":
            continue  # emulated there, for tests
        if reason:
            say(f"{precision}: not available: {reason}")
            continue
        try:
            error, loop = self_test(device, precision)
        except Exception as failure:
            say(f"{precision}: FAILED: {said_of(failure)}")
            healthy = False
            continue
        errors[precision] = error
        right = error <= MAX_ERROR[precision]
        healthy &= right
        verdict = "right" if right else "WRONG"
        say(f"{precision}: {verdict}, relative error {error:.5f} (at most {MAX_ERROR[precision]})")
        if loop is not None:
            say(f"{precision}: ran in {loop.name}" + (f": {loop.why_not_faster}" if loop.why_not_faster else ""))
    if device.type == "cuda" and not unsupported_reason(device, torch.bfloat16, 128, "16bit"):
        from sla2_kernels.kernels.launch import why_not_direct

        if why_not_direct():
            say(f"slower at short lengths: {why_not_direct()}")
    if not healthy or unsupported_reason(device, torch.bfloat16, 128, "16bit"):
        say("no benchmark")
        return healthy
    rows = benchmark(device)
    for line in benchmark_lines(device, rows):
        say(line)
    say(paste_line(device, rows, errors))
    return healthy


def main(arguments=()):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first-run", action="store_true", help="an empty cache of kernels, as after an install")
    if parser.parse_args(arguments).first_run:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["TRITON_CACHE_DIR"] = folder  # read when the first kernel is compiled
            return examine()
    return examine()


def examine():
    """Prints the report; the exit status."""
    print("```text\nsla2 doctor")
    for name, value in environment():
        print(f"{name}: {value}")
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())] or [torch.device("cpu")]
    healthy = True
    for device in devices:
        print(f"\n{device}")
        healthy &= check(device, lambda line: print(f"  {line}", flush=True))
    if devices[0].type == "cpu":
        reason = unsupported_reason(devices[0], torch.bfloat16, 128, "16bit", backend="triton")
        print(f"\nNo speed-up on this machine: {reason}.")
    print("```")
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
