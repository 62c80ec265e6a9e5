"""Time, memory, and what the card can do at most."""

import platform
import statistics
import time
from dataclasses import dataclass

import torch

from sla2_kernels.support import on_device


def is_gpu(device):
    return torch.device(device).type == "cuda"


def use_device(device):
    """Makes the GPU that a --device argument names by number, such as "cuda:1", the process's current one.

    Rivals' kernels, ComfyUI and most timers ask for the current device, not for that of the tensors.
    """
    if is_gpu(device) and torch.device(device).index is not None:
        torch.cuda.set_device(device)


def median_ms(function, device, *, least_ms=120, repeats=7):
    """Median milliseconds of ``function()``: GPU events through triton.testing.do_bench, which clears the L2 in between.

    Warmed up first; timed for ``least_ms`` or ``repeats`` calls, whichever is longer. On the CPU: wall-clock time.
    """
    function()
    if not is_gpu(device):
        return statistics.median(_wall_ms(function) for _ in range(3))
    from triton.testing import do_bench

    # do_bench records its events and clears the cache of the current device
    with on_device(torch.device(device)):
        torch.cuda.synchronize()
        once = _wall_ms(lambda: (function(), torch.cuda.synchronize()))
        return do_bench(function, warmup=25, rep=max(least_ms, repeats * once), return_mode="median")


def graph_timer(function, calls):
    """A function that returns the GPU milliseconds of one ``function()``, launched by a CUDA graph of ``calls`` of them."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()

    return lambda: event_ms(graph.replay) / calls


def event_ms(function, calls=1):
    """Milliseconds of one ``function()`` between two events of the GPU, ``calls`` of them one right after the other."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / calls


def launch_ms(function):
    """Median milliseconds of the host's part: how long a call takes to return, the GPU being idle before."""
    times = []
    for _ in range(9):
        torch.cuda.synchronize()
        times.append(_wall_ms(function))
    return statistics.median(times)


def _wall_ms(function):
    begin = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - begin)


def peak_bytes(function, device):
    """Most GPU memory that ``function()`` held at once beyond what was allocated before it and its own result."""
    if not is_gpu(device):
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    out = function()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    return peak - out.untyped_storage().nbytes()


@dataclass(frozen=True)
class Ceilings:
    """copy: bytes per second, read plus written. matmul: FLOP/s by format ("16bit", "fp8"), as measured."""

    copy: float
    matmul: dict[str, float]


def measure_ceilings(device="cuda"):
    """What the card reaches with a large copy and large matrix products; None on the CPU."""
    if not is_gpu(device):
        return None
    matmul = {"16bit": _matmul_rate(device)}
    if torch.cuda.get_device_capability(device) >= (8, 9):
        matmul["fp8"] = _fp8_rate(device)
    return Ceilings(_copy_rate(device), matmul)


def _copy_rate(device):
    source = torch.empty(2**30, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * source.numel() / median_ms(lambda: target.copy_(source), device) * 1e3


def _matmul_rate(device, n=8192):
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / median_ms(lambda: a @ b, device) * 1e3


def _fp8_rate(device, n=8192):
    a, b = (torch.randn(n, n, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)

    def product():
        return torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return 2 * n**3 / median_ms(product, device) * 1e3


def environment(device):
    """Card and versions of a run."""
    facts = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        facts["triton"] = None
    if is_gpu(device):
        facts["card"] = torch.cuda.get_device_name(device)
        facts["compute_capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        facts["memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
        facts["cuda"] = torch.version.cuda
        facts["driver"] = driver_version()
    else:
        facts["card"] = "cpu"
    return facts


def driver_version():
    """The NVIDIA driver's version from the kernel module; None where it does not say."""
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            words = file.readline().split()
    except OSError:
        return nvml_version()
    numbers = [word for word in words if word.count(".") >= 1 and word.replace(".", "").isdigit()]
    return numbers[0] if numbers else None


def nvml_version():
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None
