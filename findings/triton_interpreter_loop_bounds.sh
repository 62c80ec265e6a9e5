#!/usr/bin/env bash
# Triton 3.6.0 (of torch 2.10 and 2.11), TRITON_INTERPRET=1, NumPy 2.4.6: a loop whose bound is an argument of the kernel raises
# "only 0-dimensional arrays can be converted to Python scalars". The interpreter holds the bound as an array of one element and
# calls int() of it, which NumPy deprecated in 1.25 and refuses since 2.4. With NumPy 2.3.5 the same kernel runs.
# Triton's metadata bounds no NumPy. 3.2.0 to 3.5.1 have the same line; 3.7.1 squeezes the array first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip "$@"; }
pip install -q torch==2.13.0 numpy==2.4.6
pip install -q --no-deps triton==3.6.0
pip install -q --no-deps --target "$folder/older" numpy==2.3.5
cat > "$folder/loop.py" <<'PY'
import numpy
import torch
import triton
import triton.language as tl


@triton.jit
def count(out, steps):
    found = 0
    for _ in range(steps):
        found += 1
    tl.store(out, found)


out = torch.zeros(1, dtype=torch.int32)
versions = f"triton {triton.__version__}, numpy {numpy.__version__}"
try:
    count[(1,)](out, 7)
except Exception as error:
    print(f"{versions}: {type(error.__cause__).__name__}: {error.__cause__}")
else:
    print(f"{versions}: {out.item()}")
PY
export TRITON_INTERPRET=1
"$folder/venv/bin/python" "$folder/loop.py" | tee "$folder/new"
PYTHONPATH="$folder/older" "$folder/venv/bin/python" -W ignore "$folder/loop.py" | tee "$folder/old"
grep -q "numpy 2.4.6: TypeError: only 0-dimensional arrays" "$folder/new" && grep -q "numpy 2.3.5: 7$" "$folder/old" ||
    { echo "the interpreter's loop bounds no longer behave as described"; exit 1; }
echo "as seen before: a loop bound that is an argument needs NumPy 2.3 or older"
