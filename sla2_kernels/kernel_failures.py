"""Errors by which Triton, the compiler or the driver say that kernels cannot be built, loaded or started on a machine.

Such an error has nothing to do with the call that raised it, and every later call would raise it too: a caller that has dense
attention uses that from then on. Errors that leave the GPU unusable (an illegal address, a failed launch) are not among these.
"""

import subprocess

from .support import triton_install_command

DRIVER = "update the NVIDIA driver, and delete Triton's cache (.triton in your home folder, or TRITON_CACHE_DIR)"
CACHE = "delete Triton's cache (.triton in your home folder), or name a folder in TRITON_CACHE_DIR that may be written and run from"
COMPILER = (
    "install a C compiler and Python's headers (Debian, Ubuntu: build-essential and python3-dev; portable ComfyUI on "
    "Windows: Python's own folders include and libs in python_embeded)"
)
WINDOWS = "install Microsoft's Visual C++ redistributable, and delete Triton's cache (.triton in your home folder)"
REINSTALL = "install the Triton that belongs to your PyTorch: {install}"
DOCTOR = "tooling/doctor.py in this pack's folder says what runs on this machine"

# (kind of error, words in its message, what helps), from reports of users and from the sources of Triton 3.2 to 3.9
MESSAGES = (
    (RuntimeError, "Triton Error [CUDA]: device kernel image is invalid", DRIVER),
    (RuntimeError, "Triton Error [CUDA]: no kernel image is available", DRIVER),
    (RuntimeError, "Triton Error [CUDA]: the provided PTX was compiled with an unsupported toolchain", DRIVER),
    (RuntimeError, "Triton Error [CUDA]: a PTX JIT compilation failed", DRIVER),
    (RuntimeError, "from libcuda.so", DRIVER),  # "Failed to retrieve cuLaunchKernelEx from libcuda.so.1"
    (RuntimeError, "Failed to open libcuda.so", DRIVER),
    (AssertionError, "libcuda.so cannot found", DRIVER),
    (RuntimeError, "There should only be one.", REINSTALL),  # "0 active drivers ([]). There should only be one."
    (RuntimeError, "Internal Triton PTX codegen error", REINSTALL),
    (RuntimeError, "`ptxas` failed with error code", REINSTALL),
    (RuntimeError, "`ptxas` raised SIGSEGV", REINSTALL),
    (RuntimeError, "Cannot find ptxas", REINSTALL),
    (RuntimeError, "Triton only support CUDA 10.0 or higher", REINSTALL),
    (RuntimeError, "PassManager::run failed", REINSTALL),
    (RuntimeError, "Failed to find C compiler", COMPILER),
    (RuntimeError, "Failed to find C++ compiler", COMPILER),
    (RuntimeError, "Could not create or locate cache dir", CACHE),
    (RuntimeError, "Failed to load newly compiled", CACHE),
    (ImportError, "DLL load failed", WINDOWS),
    (ImportError, "failed to map segment from shared object", CACHE),  # a cache on a disk mounted noexec
    (ImportError, "cannot open shared object file", CACHE),
    (ImportError, "undefined symbol", CACHE),
    (ImportError, "GLIBC", CACHE),
    (subprocess.SubprocessError, "", COMPILER),
    (OSError, "", CACHE),  # read-only, full, no compiler to start
)


def kernel_failure_remedy(error):
    """What the user can do about an error that says kernels cannot be built, loaded or started; None for other errors."""
    for kind, words, remedy in MESSAGES:
        if isinstance(error, kind) and words in str(error):
            return remedy.format(install=triton_install_command())
    modules = {base.__module__.split(".")[0] for base in type(error).__mro__}
    from_triton = "triton" in modules or (isinstance(error, ImportError) and _is_of_triton(error.name))
    return DOCTOR if from_triton else None


def _is_of_triton(module):
    return module is not None and module.split(".")[0] == "triton"


def failure_in_a_line(error):
    """The error's kind and first line, with ptxas' own complaint where it has one: "PTXASError: ..."."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    complaints = [line for line in lines[1:] if line.startswith("ptxas") and ("fatal" in line or "error" in line)]
    return f"{type(error).__name__}: {' '.join([lines[0], *complaints[:1]])[:240]}"
