#!/usr/bin/env bash
# comfy-kitchen 0.2.40, torch 2.13.0, on a CPU: an operation in place on a QuantizedTensor computes on a dequantised copy and drops
# it. No error, no warning, and the tensor is as it was: mul_(), +=, add_(), lerp_(), addmm_(), fill_(), clamp_(), index_copy_(),
# assignment to a row, out=, torch._foreach_add_() and torch.nn.init.zeros_(), in each of four layouts. So a LoRA that is merged by
# weight.add_(up @ down) into a checkpoint in FP8, MXFP8, NVFP4 or INT8 is not merged, and its strength changes nothing.
# copy_() of a plain tensor raises TypeError, copy_() of another QuantizedTensor works. What holds for all of them:
# weight = QuantizedTensor.from_float(weight.dequantize() + up @ down, layout), and assign that.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip "$@"; }
pip install -q torch==2.13.0 numpy==2.3.5 packaging==25.0
pip install -q --no-deps comfy-kitchen==0.2.40
cat > "$folder/in_place.py" <<'PY'
import torch
from comfy_kitchen.tensor import QuantizedTensor

torch.manual_seed(0)
weight = torch.randn(128, 64, dtype=torch.bfloat16)
up, down = torch.randn(128, 4, dtype=torch.bfloat16), torch.randn(4, 64, dtype=torch.bfloat16)


def add_operator(x):
    x += 1


def assign_row(x):
    x[3] = 0


IN_PLACE = {
    "mul_(2)": lambda x: x.mul_(2),
    "+= 1": add_operator,
    "add_(up @ down)": lambda x: x.add_(up @ down),
    "lerp_()": lambda x: x.lerp_(up @ down, 0.5),
    "addmm_()": lambda x: x.addmm_(up, down),
    "fill_(1)": lambda x: x.fill_(1),
    "clamp_()": lambda x: x.clamp_(-0.5, 0.5),
    "index_copy_()": lambda x: x.index_copy_(0, torch.tensor([1]), down[:1]),
    "x[3] = 0": assign_row,
    "torch.add(out=x)": lambda x: torch.add(up @ down, 1, out=x),
    "torch._foreach_add_()": lambda x: torch._foreach_add_([x], [up @ down]),
    "nn.init.zeros_()": torch.nn.init.zeros_,
}
for layout in ("TensorCoreFP8Layout", "TensorCoreMXFP8Layout", "TensorCoreNVFP4Layout", "TensorWiseINT8Layout"):
    lost = []
    for name, operation in IN_PLACE.items():
        quantised = QuantizedTensor.from_float(weight, layout)
        before = quantised.dequantize().clone()
        expected = before.clone()
        operation(expected)
        operation(quantised)
        assert not torch.equal(expected, before)
        assert torch.equal(quantised.dequantize(), before), f"{name} changes the tensor now"
        lost.append(name)
    print(f"{layout}: unchanged by {', '.join(lost)}")
    quantised = QuantizedTensor.from_float(weight, layout)
    try:
        quantised.copy_(weight)
    except TypeError as error:
        print(f"  copy_(plain tensor): TypeError: {error}")
    else:
        raise AssertionError("copy_() of a plain tensor works now")
    merged = QuantizedTensor.from_float(quantised.dequantize() + up @ down, layout)
    quantised.copy_(merged)
    assert torch.equal(quantised.dequantize(), merged.dequantize())
print("as seen before: operations in place are lost")
PY
"$folder/venv/bin/python" -W ignore "$folder/in_place.py" || { echo "comfy-kitchen no longer loses operations in place as described"; exit 1; }
