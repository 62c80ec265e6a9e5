#!/usr/bin/env bash
# Triton 3.6.0: maxnreg below what a product would like is no obstacle on sm_80, 89, 100 and 120: a product of 128 x 128 by 8
# warps compiles with at most 80 registers a thread and with 40. For sm_90 it is a PTXASError: there tl.dot becomes wgmma,
# whose 64 sums a thread must all be in registers at a time, and ptxas asks for 90. A configuration that compiles for every
# other card so fails on Hopper alone. What to do: choose maxnreg by compute capability, or smaller tiles.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q triton==3.6.0
cat > "$folder/registers.py" <<'PY'
import contextlib
import io
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

M, N, K = 128, 128, 64
LIMITS = 128, 80, 40


@triton.jit
def product(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N), tl.arange(0, K)
    tl.store(out + m * N + n, tl.dot(tl.load(a + m * K + k), tl.load(b + k[:, None] * N + n)))


def compiled(arch, registers):
    """"compiles", or the error with how many registers ptxas asks for."""
    sizes = {"M": M, "N": N, "K": K}
    source = ASTSource(
        product,
        signature={"a": "*bf16", "b": "*bf16", "out": "*fp32", **dict.fromkeys(sizes, "constexpr")},
        constexprs=sizes,
        attrs={(i,): [["tt.divisibility", 16]] for i in range(3)},
    )
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Triton prints the whole kernel along with such an error
            triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 8, "maxnreg": registers})
    except triton.runtime.errors.PTXASError as error:
        return f"error: {re.search(r'register target of ([0-9]+) or higher', str(error))[1]} or more"
    return "compiles"


print("maxnreg", *LIMITS, sep=", ")
found = {arch: [compiled(arch, registers) for registers in LIMITS] for arch in (80, 89, 90, 100, 120)}
for arch, said in found.items():
    print(f"sm_{arch}", *said, sep=", ")
hopper = found.pop(90)
assert all(said == ["compiles"] * 3 for said in found.values()), "other cards no longer compile all of them"
assert hopper[0] == "compiles" and all("error" in said for said in hopper[1:]), "Hopper compiles others than before"
print("as seen before: too few registers are an error on Hopper alone")
PY
TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" "$folder/registers.py" || { echo "maxnreg no longer does what is described"; exit 1; }
