#!/usr/bin/env bash
# How wide Triton loads depends on what else the kernel stores. Alone, a tile of bfloat16 is loaded 8 numbers a thread: a warp's
# instruction takes whole lines. If the kernel also stores an INT8 tile of that shape, whose 16 bytes are 16 numbers, each thread gets 16
# neighbours of both, and the load becomes two instructions of which each takes half of every 32 bytes, so that the first-level cache is
# asked twice. In a kernel that quantises K and V so, on an H200, that cost a sixth of the time. tl.max_contiguous() of the store's
# offsets (8 instead of 16) undoes it, but only where the offsets are computed: said of a parameter of a @triton.jit function,
# the same hint vanishes without a word when that is inlined.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/width.py" <<'PY'
import json
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def in_eights(offsets):
    return tl.max_contiguous(offsets, [1, 8])


@triton.jit
def loads(x, out, bytes_out, KIND: tl.constexpr):
    row, d = tl.arange(0, 64), tl.arange(0, 128)
    tile = tl.load(x + row[:, None] * 128 + d).to(tl.float32)
    tl.store(out + row, tl.sum(tile, 1))
    if KIND != "alone":
        offsets = row[:, None] * 128 + d
        if KIND == "hint":
            offsets = tl.max_contiguous(offsets, [1, 8])
        elif KIND == "hint in a function":
            offsets = in_eights(offsets)
        tl.store(bytes_out + offsets, tile.to(tl.int8))


def numbers(kind):
    """How many neighbours of the loaded tile a thread has."""
    types = {"x": "*bf16", "out": "*fp32", "bytes_out": "*i8"}
    source = ASTSource(loads, signature=types | {"KIND": "constexpr"}, constexprs={(3,): kind})
    source.attrs = {(i,): [["tt.divisibility", 16]] for i in range(3)}
    text = triton.compile(source, target=GPUTarget("cuda", 89, 32), options={"num_warps": 8}).asm["ttgir"]
    layout = re.search(r"tt\.load .*tensor<64x128x!tt\.ptr<bf16>, (#\w+)>", text)[1]
    return int(re.search(rf"{layout} = .*sizePerThread = \[1, (\d+)\]", text)[1])


found = {kind: numbers(kind) for kind in ("alone", "beside INT8", "hint", "hint in a function")}
print(f"Triton {triton.__version__}, numbers of bfloat16 a thread loads: {json.dumps(found)}")
assert found == {"alone": 8, "beside INT8": 16, "hint": 8, "hint in a function": 16}
PY
for release in 3.4.0 3.6.0 3.9.0; do
  python3 -m venv "$folder/$release"
  "$folder/$release/bin/python" -m pip install -q setuptools "triton==$release"
  TRITON_CACHE_DIR="$folder/cache" "$folder/$release/bin/python" "$folder/width.py" || {
    echo "Triton's loads are no longer as wide as described"
    exit 1
  }
done
