"""Compiles a kernel for sm_90 with Triton's cache in FOLDER; prints whether the operator knows the error.

python compile_one_kernel.py FOLDER PACK
"""

import os
import sys

os.environ["TRITON_CACHE_DIR"] = sys.argv[1]
os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, sys.argv[2])

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sla2_kernels.kernel_failures import kernel_failure_remedy


@triton.jit
def add_one(x, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + offsets, tl.load(x + offsets, mask=offsets < n) + 1, mask=offsets < n)


signature = {"x": "*fp32", "n": "i32", "BLOCK": "constexpr"}
try:
    triton.compile(ASTSource(add_one, signature, {(2,): 128}), target=GPUTarget("cuda", 90, 32))
    print("compiled")
except Exception as error:
    print(kernel_failure_remedy(error) is not None, type(error).__name__, error)
