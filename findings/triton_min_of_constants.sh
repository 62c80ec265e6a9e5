#!/usr/bin/env bash
# Triton up to 3.5.1: min() and max() of two tl.constexpr are no constant but a tensor, also where the name that takes it is
# annotated tl.constexpr, which is accepted without a word. The error comes where the name is used as a size, in another line:
# "arange's arguments must be of type tl.constexpr". A conditional expression of the same constants is one. From 3.6.0 on min()
# and max() are too, so a kernel written there does not compile with what PyTorch 2.6 to 2.9 bring.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/constants.py" <<'PY'
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def smaller(out, A: tl.constexpr, B: tl.constexpr):
    SIZE: tl.constexpr = min(A, B)
    tl.store(out + tl.arange(0, SIZE), 1.0)


@triton.jit
def larger(out, A: tl.constexpr, B: tl.constexpr):
    SIZE: tl.constexpr = max(A, B)
    tl.store(out + tl.arange(0, SIZE), 1.0)


@triton.jit
def conditional(out, A: tl.constexpr, B: tl.constexpr):
    SIZE: tl.constexpr = A if A < B else B
    tl.store(out + tl.arange(0, SIZE), 1.0)


def outcome(kernel):
    types = {"out": "*fp32", "A": "constexpr", "B": "constexpr"}
    source = ASTSource(kernel, signature=types, constexprs={"A": 16, "B": 32})
    try:
        triton.compile(source, target=GPUTarget("cuda", 89, 32))
    except triton.CompilationError as error:
        text = f"{error} {error.__cause__}"
        assert "must be of type tl.constexpr" in text, text
        return "refused"
    return "compiled"


found = [outcome(kernel) for kernel in (smaller, larger, conditional)]
print(f"Triton {triton.__version__}: min of constants {found[0]}, max {found[1]}, conditional expression {found[2]}")
wanted = ["refused", "refused", "compiled"] if sys.argv[1] == "tensor" else ["compiled"] * 3
assert found == wanted, f"Triton {triton.__version__} treats min() and max() of constants in another way now"
PY
for release in 3.5.1:tensor 3.6.0:constant; do
  python3 -m venv "$folder/${release%:*}"
  "$folder/${release%:*}/bin/python" -m pip install -q "triton==${release%:*}"
  TRITON_CACHE_DIR="$folder/cache" "$folder/${release%:*}/bin/python" "$folder/constants.py" "${release#*:}" || {
    echo "min() and max() of constants are no longer compiled as described"
    exit 1
  }
done
echo "as seen before: min() of constants is a tensor in 3.5.1 and a constant in 3.6.0"
