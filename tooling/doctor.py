"""sla2 doctor: what runs on this machine, to paste into an issue. Needs this folder and PyTorch, no ComfyUI.

    python -m tooling.doctor            in the pack's folder
    python tooling/doctor.py            from anywhere, also with a portable ComfyUI's python_embeded

Exits with 1 where the kernels and the reference disagree, or an attention call fails.
"""

import importlib.metadata
import os
import platform
import re
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # started as a file: the pack's folder is not on the path, and python_embeded adds no other
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from sla2_kernels import default_precision, reference, select_key_blocks, sla2_attention, unsupported_reason  # noqa: E402
from sla2_kernels.kernel_failures import failure_in_a_line, kernel_failure_remedy  # noqa: E402
from sla2_kernels.loops import watch_loops  # noqa: E402
from sla2_kernels.support import PRECISIONS  # noqa: E402

# largest relative error, |out - reference| / |reference|, that is rounding and no mistake: an H100 has 0.002, 0.031, 0.044
LARGEST_ERROR = {"16bit": 0.01, "int8": 0.06, "fp8": 0.09}
SPARSITY = 0.9
BENCHMARK_S = 5.0
# device type -> (tokens, heads, dtype)
BENCHMARK = {"cuda": (32_768, 12, torch.bfloat16), "cpu": (2_048, 2, torch.float32)}


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


def benchmark(device):
    """One sentence: dense attention of PyTorch against SLA2, on random numbers."""
    tokens, heads, dtype = BENCHMARK[device.type]
    q, k, v = inputs(device, tokens, heads, dtype)
    precision = default_precision(device)
    dense = median_ms(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v), device, BENCHMARK_S / 2)
    sparse = median_ms(lambda: sla2_attention(q, k, v, sparsity=SPARSITY, precision=precision), device, BENCHMARK_S / 2)
    return (
        f"{tokens} tokens, {heads} heads of 128, {str(dtype).removeprefix('torch.')}: PyTorch's dense attention {dense:.2f} ms, "
        f"SLA2 skipping {SPARSITY:.0%} in {precision} {sparse:.2f} ms, {dense / sparse:.2f}x as fast"
    )


def check(device, say):
    """Fast path, self-test and benchmark of a device. True where all is well; what is not available is no fault."""
    healthy = True
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
            remedy = kernel_failure_remedy(failure)
            if remedy is None and not isinstance(failure, (RuntimeError, ValueError)):
                raise
            say(f"{precision}: FAILED: {failure_in_a_line(failure)}" + (f"; {remedy}" if remedy else ""))
            healthy = False
            continue
        right = error <= LARGEST_ERROR[precision]
        healthy &= right
        verdict = "right" if right else "WRONG"
        say(f"{precision}: {verdict}, relative error {error:.5f} (at most {LARGEST_ERROR[precision]})")
        if loop is not None:
            say(f"{precision}: ran in {loop.name}" + (f": {loop.why_not_faster}" if loop.why_not_faster else ""))
    if device.type == "cuda" and not unsupported_reason(device, torch.bfloat16, 128, "16bit"):
        from sla2_kernels.kernels.launch import why_not_direct

        if why_not_direct():
            say(f"slower at short lengths: {why_not_direct()}")
    say(
        benchmark(device)
        if healthy and not unsupported_reason(device, torch.bfloat16, 128, "16bit")
        else "no benchmark"
    )
    return healthy


def main():
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
    sys.exit(main())
