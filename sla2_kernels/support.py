"""What runs where: which backend a call takes, and the one sentence why the fast path cannot take it."""

import functools
import importlib.util
import os
import re
import sys
from contextlib import nullcontext
from typing import NamedTuple

import torch

PRECISIONS = ("16bit", "int8", "fp8")
BACKENDS = ("auto", "triton", "torch")
# Below it routing costs more than sparse attention saves. Measured on an H200 at 90% skipped (benchmarks/NOTES.md, "Which length
# pays"): 12 heads with a fitted ratio take 24.5 ms at 8,192 tokens where dense takes 24.3, and 28.1 for 42.7 at 12,288; 32 heads
# gain from 6,144 on, 60.8 ms for 70.0. The call is as long as the host needs to launch it there, which a slower card needs too,
# while its dense attention takes longer: no card gains later than this one. Below 8,400 tokens the error was not measured either.
MINIMUM_TOKENS = 8192
HEAD_DIMS = (32, 64, 128)
MIN_CAPABILITY = (8, 0)
MIN_TRITON = (3, 2)
MIN_TRITON_ON_BLACKWELL = (3, 3, 1)  # compute capability 10.0 and 12.0
# what each torch release requires in its own metadata
TRITON_OF_TORCH = {
    "2.6": "3.2", "2.7": "3.3", "2.8": "3.4", "2.9": "3.5", "2.10": "3.6", "2.11": "3.6", "2.12": "3.7", "2.13": "3.7",
    "2.14": "3.8", "2.15": "3.9",
}  # fmt: skip
NOT_FOR_WINDOWS = ("3.9",)  # triton-windows had no such release when this table was written


def interpreting():
    """True where Triton runs kernels in its CPU interpreter (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def on_device(device):
    """Context in which ``device``, a torch.device, is the current CUDA device; on other devices it does nothing.

    Triton launches on the current device, whatever device its tensors lie on, and torch's stream queries mean it too.
    """
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def without_autocast(device):
    """Context in which autocast is off on ``device``, a torch.device; on devices without autocast (meta) it does nothing."""
    # torch 2.9 and older cannot compile the question
    known = device.type in ("cpu", "cuda") or torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


@functools.cache
def _cuda_capability(index):
    return torch.cuda.get_device_capability(index)


def capability(device):
    """Compute capability (major, minor) that kernels on ``device`` are chosen for.

    CPU tensors in Triton's interpreter behave as sm_89, or as SLA2_INTERPRET_CAPABILITY says ("8.0", "9.0", ...).
    """
    if device.type == "cuda":
        return _cuda_capability(torch.cuda.current_device() if device.index is None else device.index)
    major, minor = os.environ.get("SLA2_INTERPRET_CAPABILITY", "8.9").split(".")
    return int(major), int(minor)


def has_fp8(device):
    """FP8 matrix units: sm_89 and up."""
    return capability(device) >= (8, 9)


def default_precision(device):
    """What precision "auto" means on ``device``: INT8 where the card has fast INT8 matrix units, FP8 on sm_100, else 16 bit."""
    device = torch.device(device)
    if device.type != "cuda":
        return "16bit"
    # sm_100 (B200) dropped the fast INT8 matrix instruction; RTX 50 cards (sm_120) kept it
    return "fp8" if capability(device)[0] == 10 else "int8"


def resolve_precision(precision, device):
    """A precision of sla2_attention; for "auto" what is fastest on ``device``. Raises ValueError for any other name."""
    if precision == "auto":
        return default_precision(device)
    if precision not in PRECISIONS:
        raise ValueError(f'precision must be "auto", "16bit", "int8" or "fp8", got {precision!r}.')
    return precision


def triton_install_command():
    """The one command that installs the Triton that belongs to the installed torch; without a pin where none is known."""
    triton_minor = TRITON_OF_TORCH.get(".".join(torch.__version__.split(".")[:2]))
    windows = sys.platform == "win32"
    package = "triton-windows" if windows else "triton"
    known = triton_minor is not None and not (windows and triton_minor in NOT_FOR_WINDOWS)
    requirement = f'"{package}=={triton_minor}.*"' if known else package
    return f"{sys.executable} -m pip install {requirement}"


@functools.cache
def why_no_triton():
    """One sentence, or None where Triton can be used; looked up once."""
    if importlib.util.find_spec("triton") is None:
        return f"Triton is not installed; install it with: {triton_install_command()}"
    try:
        import triton
    except (ImportError, OSError) as error:  # a DLL or shared library that it needs, or a broken installation
        first = (str(error).splitlines() or [""])[0]
        return (
            f"Triton is installed but cannot be imported ({type(error).__name__}: {first}); "
            f"reinstall it with: {triton_install_command()}"
        )
    version = triton_version()
    if not version:
        return (
            f"Triton's version {triton.__version__!r} is no number; install a release with: {triton_install_command()}"
        )
    if version < MIN_TRITON:
        return f"Triton {triton.__version__} is too old (3.2 or newer is needed); update it with: {triton_install_command()}"
    return None


def triton_version():
    """The leading numbers of the installed Triton's version, three at most: 3.5.0rc1 is (3, 5, 0), 3.3.0+git1 (3, 3, 0)."""
    import triton

    numbers = re.match(r"\d+(\.\d+){0,2}", triton.__version__)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()


def is_tested_triton(releases):
    """Whether the installed Triton is of one of these (major, minor), for what uses its private or changing parts."""
    return triton_version()[:2] in releases


def _blackwell_reason(device):
    major, minor = capability(device)
    if device.type != "cuda" or major < 10 or triton_version() >= MIN_TRITON_ON_BLACKWELL:
        return None
    return (
        f"a card of compute capability {major}.{minor} needs Triton 3.3.1 or newer; "
        "update it together with PyTorch (2.7.1 or newer)"
    )


def _card_reason(device):
    if device.type == "cpu":
        return None if interpreting() else "the Triton kernels need an NVIDIA GPU, and these tensors are on the CPU"
    if device.type != "cuda":
        return f"the Triton kernels need an NVIDIA GPU, and these tensors are on a {device.type} device"
    if torch.version.hip:
        return "the Triton kernels need an NVIDIA GPU, and this is an AMD card (ROCm)"
    major, minor = capability(device)
    if (major, minor) < MIN_CAPABILITY:
        return (
            f"the Triton kernels need compute capability 8.0 (RTX 30, A100) or newer, and this card has {major}.{minor}"
        )
    return None


def kernels_reason(device):
    """None where Triton's kernels run on ``device``, a torch.device, else one sentence why not."""
    return _card_reason(device) or why_no_triton() or _blackwell_reason(device)


def triton_reason(device, dtype, head_dim, precision):
    """None where the Triton kernels take such a call, else one sentence why not."""
    reason = kernels_reason(device)
    if reason:
        return reason
    if dtype not in (None, torch.float16, torch.bfloat16, torch.float32):
        return f"the Triton kernels take float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
    if head_dim not in HEAD_DIMS:
        return f"the Triton kernels take head_dim 32, 64 and 128, not {head_dim}"
    if precision == "fp8" and not has_fp8(device):
        major, minor = capability(device)
        return f'precision "fp8" needs compute capability 8.9 (RTX 40) or newer, and this card has {major}.{minor}; use "int8"'
    return None


def unsupported_reason(device, dtype, head_dim, precision="int8", backend="auto"):
    """Why the operator has no fast path for such a call: None, or one sentence for the user.

    Args:
        device: torch.device or its name. dtype: of q, k and v, or None before they are known. head_dim: D. precision: "16bit" | "int8" | "fp8".
        backend: "torch" is always possible; "auto" counts the torch backend as a fast path on the CPU alone.
    """
    device = torch.device(device)
    if backend == "torch" or (backend == "auto" and device.type == "cpu"):
        return None
    return triton_reason(device, dtype, head_dim, precision)


class Backend(NamedTuple):
    """What computes a call. name: "triton" or "torch". why_not_triton: None for Triton, else one sentence."""

    name: str
    why_not_triton: str | None = None


def resolve_backend(backend, device, dtype, head_dim, precision):
    """The Backend that takes a call. Raises ValueError where an explicit "triton" cannot run: it never falls back."""
    reason = triton_reason(device, dtype, head_dim, precision)
    if backend == "torch" or (backend == "auto" and device.type == "cpu"):
        return Backend("torch", reason or 'backend "torch" was asked for')
    if reason is None:
        return Backend("triton")
    # a card without FP8 would silently get another precision than the one asked for
    if backend == "triton" or (precision == "fp8" and reason.startswith("precision")):
        raise ValueError(f"sla2_attention cannot run: {reason}.")
    return Backend("torch", reason)
