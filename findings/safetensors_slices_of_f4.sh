#!/usr/bin/env bash
# safetensors 0.8.0, torch 2.13.0: a tensor of torch.float4_e2m1fn_x2, two numbers to a byte, is written as F4 with its last
# dimension doubled and read back whole by get_tensor(). Any slice of it, the whole range included, raises
# "shape '[4, 32]' is invalid for input of size 64", and get_slice().get_shape() is not the shape of get_tensor().
# The same bytes as uint8 slice rightly. Who loads NVFP4 or MXFP4 checkpoints shard by shard must view them as uint8 first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip "$@"; }
pip install -q torch==2.13.0 numpy==2.3.5 safetensors==0.8.0
cat > "$folder/slices.py" <<'PY'
import sys

import torch
from safetensors import safe_open
from safetensors.torch import save_file

path = sys.argv[1] + "/four.safetensors"
numbers = torch.arange(64, dtype=torch.uint8).view(4, 16)
save_file({"f4": numbers.view(torch.float4_e2m1fn_x2), "bytes": numbers.clone()}, path)
with safe_open(path, "pt") as file:
    whole, part = file.get_tensor("f4"), file.get_slice("f4")
    print("get_tensor:", whole.dtype, tuple(whole.shape), "  get_slice:", part.get_dtype(), part.get_shape())
    assert torch.equal(whole.view(torch.uint8), numbers)
    assert list(whole.shape) != part.get_shape(), "the two shapes agree now"
    assert torch.equal(file.get_slice("bytes")[0:2], numbers[0:2])
    for name, cut in {"[:]": slice(None), "[0:2]": slice(0, 2)}.items():
        try:
            part[cut]
        except RuntimeError as error:
            print(f"get_slice('f4'){name}: RuntimeError: {error}")
        else:
            raise AssertionError(f"get_slice('f4'){name} works now")
print("as seen before: F4 tensors cannot be sliced")
PY
"$folder/venv/bin/python" "$folder/slices.py" "$folder" || { echo "safetensors no longer reads F4 as described"; exit 1; }
