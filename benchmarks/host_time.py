"""How long the Python of one call of the operator takes, on a machine without a GPU: a timing tool, not a test.

    python -m benchmarks.host_time               RTX 40's kernels (sm_89)
    python -m benchmarks.host_time --arch 90     Hopper's

Tensors lie on the CPU and say that they are on a GPU, kernels are compiled for the card named (a minute, once; Triton keeps them)
and their launcher does nothing. So a time holds neither Triton's own launcher nor the driver, which add 1.3 us and 2 to 4 us a
launch, nor what torch's operations take longer on a GPU; taking the host's memory takes some 40 us that a GPU's does not. For
comparing two builds, one right after the other.
"""

import argparse
import gc
import statistics
import time
from contextlib import nullcontext
from types import SimpleNamespace

import torch

from sla2_kernels.kernels import launch

from .consumer import SHAPES, sla2_calls
from .inputs import make_inputs

CALLS = 1000
GPU = torch.device("cuda", 0)


class Launcher:
    """Stands for Triton's launcher; counts."""

    launches = 0

    def __init__(self, src, metadata):
        pass

    def __call__(self, *args):
        Launcher.launches += 1


class AbsentCard:
    """As much of a Triton driver as compiling, loading and launching ask for."""

    launcher_cls = Launcher
    utils = SimpleNamespace(
        load_binary=lambda *args: (1, 1, 0, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 227 * 1024, "max_num_regs": 65536, "warpSize": 32},
    )

    def __init__(self, arch):
        self.arch = arch

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


def pretend(arch):
    """From now on every tensor of this process says that it is on a card of compute capability ``arch``, and none is."""
    from triton.runtime.driver import driver

    driver.set_active(AbsentCard(arch))
    stream = SimpleNamespace(cuda_stream=0, wait_stream=lambda other: None)
    launch._current_and_beside = lambda: (stream, stream)
    torch.cuda.current_device = lambda: 0
    torch.cuda.device = lambda device: nullcontext()
    torch.cuda.get_device_capability = lambda device: divmod(arch, 10)
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
    empty, to = torch.empty, torch.Tensor.to
    torch.empty = lambda *size, device=None, **options: empty(*size, **options)
    torch.Tensor.to = lambda self, *to_what, device=None, **options: to(
        self, *(what for what in to_what if not isinstance(what, torch.device)), **options
    )
    torch.Tensor.is_cuda = property(lambda self: True)
    torch.Tensor.device = property(lambda self: GPU)


def microseconds(call):
    """Median of ``call()``, the first calls left out."""
    for _ in range(50):
        call()
    gc.collect()
    gc.disable()
    times = []
    for _ in range(CALLS):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    gc.enable()
    return 1e6 * statistics.median(times)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, default=89, help="compute capability: 80, 86, 89, 90, 120")
    parser.add_argument("--shapes", nargs="*", default=["1.3B-480p", "LTX-2"], choices=list(SHAPES))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    options = {"query_block": 64} if args.arch == 90 else {}
    calls = {name: sla2_calls(*make_inputs(SHAPES[name], device="cpu"), 0.97, **options) for name in args.shapes}
    pretend(args.arch)
    for name, of_shape in calls.items():
        for kind, call in zip(("ratio given", "ratio fitted"), of_shape, strict=True):
            found = microseconds(call)
            before = Launcher.launches
            call()
            print(f"sm_{args.arch} {name:10s} {kind:12s} {found:6.1f} us, {Launcher.launches - before} launches")


if __name__ == "__main__":
    main()
