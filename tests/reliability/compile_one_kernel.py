"""Compiles a kernel for sm_90 with Triton's cache in FOLDER; prints whether sparse_failure.py knows the error.

python compile_one_kernel.py FOLDER SPARSE_FAILURE
"""

import importlib.util
import os
import sys

os.environ["TRITON_CACHE_DIR"] = sys.argv[1]
os.environ.pop("TRITON_INTERPRET", None)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def add_one(x, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + offsets, tl.load(x + offsets, mask=offsets < n) + 1, mask=offsets < n)


spec = importlib.util.spec_from_file_location("sparse_failure", sys.argv[2])
sparse_failure = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sparse_failure)
signature = {"x": "*fp32", "n": "i32", "BLOCK": "constexpr"}
try:
    triton.compile(ASTSource(add_one, signature, {(2,): 128}), target=GPUTarget("cuda", 90, 32))
    print("compiled")
except Exception as error:
    print(sparse_failure.is_kernel_failure(error), type(error).__name__, error)
