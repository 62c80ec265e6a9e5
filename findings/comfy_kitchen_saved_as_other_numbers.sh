#!/usr/bin/env bash
# comfy-kitchen 0.2.40, safetensors 0.8.0, torch 2.13.0, on a CPU: safetensors.torch.save() takes a QuantizedTensor without an error and
# writes its packed 8-bit or 4-bit bytes under the dtype that it had before, BF16: the file has its name, shape and dtype, and other
# numbers. torch.save() and copy.deepcopy(), of a module that holds it too, raise RuntimeError about "an invalid python storage".
# So a quantised weight must be saved as the packed data and scales that its own state_dict() returns, or dequantised; a teacher
# or an average of a model with such weights cannot be made by deepcopy.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip "$@"; }
pip install -q torch==2.13.0 numpy==2.3.5 packaging==25.0 safetensors==0.8.0
pip install -q --no-deps comfy-kitchen==0.2.40
cat > "$folder/save.py" <<'PY'
import copy
import io
import warnings

import torch
from comfy_kitchen.tensor import QuantizedTensor
from safetensors.torch import load, save

warnings.filterwarnings("ignore", category=UserWarning)
torch.manual_seed(0)
weight = torch.randn(256, 128, dtype=torch.bfloat16)
for layout in ("TensorCoreFP8Layout", "TensorWiseINT8Layout"):
    made = QuantizedTensor.from_float(weight, layout)
    # the packed data at the front of a longer tensor, which has as many bytes as BF16 needs
    packed = torch.cat([made._qdata, made._qdata])[: len(weight)]
    quantised = QuantizedTensor(packed, layout, made._params)
    numbers = quantised.dequantize()
    read = load(save({"weight": quantised}))["weight"]
    assert read.dtype == numbers.dtype and read.shape == numbers.shape
    as_bytes = read.view(torch.uint8).flatten()[: packed.numel()]
    assert torch.equal(as_bytes, packed.view(torch.uint8).flatten()), "what is written is no longer the packed data"
    agree = (read == numbers).float().mean().item()
    print(f"{layout}: saved as {read.dtype} {tuple(read.shape)}, {100 * agree:.1f}% of the numbers are those of the tensor")
    assert agree < 0.05, "safetensors writes the numbers now"
    assert torch.equal(load(save({"weight": numbers}))["weight"], numbers)
    stored = load(save(quantised.state_dict("weight")))
    print(f"{layout}: its state_dict() has {', '.join(f'{name} {tensor.dtype}' for name, tensor in sorted(stored.items()))}")
    module = torch.nn.Linear(128, 256, bias=False)
    module.weight = torch.nn.Parameter(quantised, requires_grad=False)
    attempts = {
        "copy.deepcopy(module)": lambda: copy.deepcopy(module),
        "torch.save(tensor)": lambda: torch.save(quantised, io.BytesIO()),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
        except RuntimeError as error:
            print(f"{layout}: {name}: RuntimeError: {str(error).splitlines()[0]}")
        else:
            raise AssertionError(f"{name} works now")
print("as seen before: quantised tensors are saved as other numbers, or not at all")
PY
"$folder/venv/bin/python" "$folder/save.py" || { echo "quantised tensors are no longer saved as described"; exit 1; }
