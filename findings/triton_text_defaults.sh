#!/usr/bin/env bash
# Triton 3.3.1 to 3.6.0: a text that is the default of a tl.constexpr parameter does not compile in a function that a kernel calls:
# "'str' object has no attribute 'type'", raised at the call and not at the default. A number as the default does, the same text as
# an argument does, and so does the default written tl.constexpr("..."). With 3.2.0 and from 3.7.0 on all four do, so a helper with
# an eviction policy or a rounding mode as its default that works there fails with what PyTorch 2.7 to 2.11 bring.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/defaults.py" <<'PY'
import inspect
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def offset(x, NUMBER: tl.constexpr = 1):
    return tl.load(x + NUMBER)


@triton.jit
def kept(x, POLICY: tl.constexpr = "evict_last"):
    return tl.load(x, eviction_policy=POLICY)


@triton.jit
def kept_as_constant(x, POLICY: tl.constexpr = tl.constexpr("evict_last")):
    return tl.load(x, eviction_policy=POLICY)


@triton.jit
def number_as_default(x, out):
    tl.store(out, offset(x))


@triton.jit
def text_as_default(x, out):
    tl.store(out, kept(x))


@triton.jit
def text_as_argument(x, out):
    tl.store(out, kept(x, "evict_last"))


@triton.jit
def constant_as_default(x, out):
    tl.store(out, kept_as_constant(x))


def outcome(kernel):
    constants = "constexprs" if "constexprs" in inspect.signature(ASTSource.__init__).parameters else "constants"
    source = ASTSource(kernel, signature={"x": "*fp32", "out": "*fp32"}, **{constants: {}})
    try:
        triton.compile(source, target=GPUTarget("cuda", 89, 32))
    except triton.CompilationError as error:
        text = f"{error} {error.__cause__}"
        assert "'str' object has no attribute 'type'" in text, text
        return "refused"
    return "compiled"


kernels = number_as_default, text_as_default, text_as_argument, constant_as_default
found = [outcome(kernel) for kernel in kernels]
print(f"Triton {triton.__version__}: " + ", ".join(f"{k.__name__} {o}" for k, o in zip(kernels, found)))
wanted = ["compiled", sys.argv[1], "compiled", "compiled"]
assert found == wanted, f"Triton {triton.__version__} treats texts as defaults in another way now"
PY
for release in 3.2.0:compiled 3.3.1:refused 3.6.0:refused 3.7.0:compiled; do
  python3 -m venv "$folder/${release%:*}"
  "$folder/${release%:*}/bin/python" -m pip install -q setuptools "triton==${release%:*}"
  TRITON_CACHE_DIR="$folder/cache" "$folder/${release%:*}/bin/python" "$folder/defaults.py" "${release#*:}" || {
    echo "texts as defaults of constants are no longer compiled as described"
    exit 1
  }
done
