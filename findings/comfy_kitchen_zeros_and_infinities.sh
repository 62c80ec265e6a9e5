#!/usr/bin/env bash
# comfy-kitchen 0.2.40, torch 2.13.0, on a CPU: a tensor of zeros quantised by TensorCoreFP8Layout or TensorCoreNVFP4Layout comes
# back as NaN, every element of it: the scale is the largest magnitude over a constant, 0, and 0 is divided by it. TensorWiseINT8Layout
# and TensorCoreMXFP8Layout give zeros. The same holds for the input of a linear layer whose weight is in FP8, so an all-zero
# prompt embedding makes NaN of its whole output, the bias included.
# An infinity is treated differently by each: in MXFP8 its block of 32 numbers becomes zeros, finite and without a word, and the rest is
# right; in FP8, NVFP4 and INT8 the whole tensor becomes NaN. Who quantises weights should test for zeros and infinities before.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip "$@"; }
pip install -q torch==2.13.0 numpy==2.3.5 packaging==25.0
pip install -q --no-deps comfy-kitchen==0.2.40
cat > "$folder/quantise.py" <<'PY'
import math

import torch
from comfy_kitchen.tensor import QuantizedTensor

torch.manual_seed(0)
ordinary = torch.randn(64, 128, dtype=torch.bfloat16)
infinite = ordinary.clone()
infinite[3, 5] = math.inf


def through(tensor, layout):
    return QuantizedTensor.from_float(tensor, layout).dequantize().float()


print("layout                  error  of zeros  with one infinity")
for layout, zeros_survive in {
    "TensorWiseINT8Layout": True,
    "TensorCoreMXFP8Layout": True,
    "TensorCoreFP8Layout": False,
    "TensorCoreNVFP4Layout": False,
}.items():
    error = float((through(ordinary, layout) - ordinary).norm() / ordinary.float().norm())
    zeros, one = through(torch.zeros_like(ordinary), layout), through(infinite, layout)
    shares = [float(x.isnan().float().mean()) for x in (zeros, one)]
    print(f"{layout:22s} {error:6.3f}  {shares[0]:4.0%} NaN  {shares[1]:4.0%} NaN")
    assert error < 0.15
    assert shares[0] == (0.0 if zeros_survive else 1.0), "zeros are treated differently now"
    if layout == "TensorCoreMXFP8Layout":
        block, rest = one[3, :32], torch.cat([one[3, 32:], one[4]])
        print("  the 32 numbers beside the infinity:", sorted(set(block.tolist())))
        assert (block == 0).all() and ordinary[3, :5].abs().min() > 0
        assert (rest - torch.cat([ordinary[3, 32:], ordinary[4]])).norm() < 0.1 * rest.norm()
    else:
        assert shares[1] == 1.0

weight = QuantizedTensor.from_float(ordinary, "TensorCoreFP8Layout")
given = QuantizedTensor.from_float(torch.zeros(2, 128, dtype=torch.bfloat16), "TensorCoreFP8Layout")
out = torch.nn.functional.linear(given, weight, torch.ones(64, dtype=torch.bfloat16))
print(f"a linear layer of zeros, bias 1: {out.float().isnan().float().mean():.0%} NaN")
assert out.float().isnan().all()
print("as seen before")
PY
"$folder/venv/bin/python" "$folder/quantise.py" || { echo "comfy-kitchen no longer quantises zeros and infinities as described"; exit 1; }
