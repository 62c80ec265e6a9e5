#!/usr/bin/env bash
# Triton 3.9.0, TRITON_INTERPRET=1: tl.dot of two bfloat16 tiles multiplies their bit patterns as unsigned integers.
# Nothing is raised: the output is finite and off by ten orders of magnitude. float16 operands are multiplied rightly.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip "$@"; }
pip install -q torch==2.13.0 numpy==2.3.5
pip install -q --no-deps triton==3.9.0
cat > "$folder/dot.py" <<'PY'
import torch
import triton
import triton.language as tl


@triton.jit
def product(x, y, out, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)
    tl.store(out + at, tl.dot(tl.load(x + at), tl.load(y + at)))


torch.manual_seed(0)
for dtype in (torch.float16, torch.bfloat16):
    x, y = (torch.randn(16, 16).to(dtype) for _ in range(2))
    out = torch.empty(16, 16)
    product[(1,)](x, y, out, 16)
    expected = x.float() @ y.float()
    print(f"{dtype}: {out[0, 0]:.6g}, expected {expected[0, 0]:.6g}")
    if dtype == torch.float16:
        assert torch.allclose(out, expected, atol=1e-4), "float16 is wrong too"
        continue
    bits = [z.view(torch.int16).double() % 65536 for z in (x, y)]
    assert torch.allclose(out.double(), bits[0] @ bits[1], rtol=1e-6), "bfloat16 is not multiplied as bits any more"
print("as seen before: the bits of bfloat16 are multiplied as unsigned integers")
PY
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/dot.py" || { echo "tl.dot of bfloat16 no longer behaves as described"; exit 1; }
