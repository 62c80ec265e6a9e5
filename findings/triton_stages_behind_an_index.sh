#!/usr/bin/env bash
# Triton 3.6.0, compiled for sm_89: a loop over tiles whose block numbers are loaded in the loop itself (sparse and paged
# attention) keeps ONE tile in shared memory with num_stages 3 and 4, where a loop over a counter keeps two and three: both
# loads of the chain share the stages, and each gets (num_stages - 1) // 2. With one tile every copy is waited for before
# the product and started after it. Two tiles need num_stages=5; shared memory is then that of two, not of four.
# Triton 3.4.0 gives both loops the same tiles, so the num_stages that 3.6.0 needs takes twice as much shared memory there.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/loop.py" <<'PY'
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROWS, KEYS, D = 64, 64, 128


@triton.jit
def selected(q, k, index, out, count, INDIRECT: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr):
    d = tl.arange(0, D)
    a = tl.load(q + tl.arange(0, ROWS)[:, None] * D + d)
    total = tl.zeros([ROWS, KEYS], tl.float32)
    for i in range(count):
        block = tl.load(index + i) if INDIRECT else i
        b = tl.load(k + (block * KEYS + tl.arange(0, KEYS))[:, None] * D + d)
        total += tl.dot(a, b.T)
    tl.store(out + tl.arange(0, ROWS)[:, None] * KEYS + tl.arange(0, KEYS), total)


def buffers(indirect, stages):
    source = ASTSource(
        selected,
        signature={"q": "*fp16", "k": "*fp16", "index": "*i32", "out": "*fp32", "count": "i32",
                   "INDIRECT": "constexpr", "ROWS": "constexpr", "KEYS": "constexpr", "D": "constexpr"},
        constexprs={"INDIRECT": indirect, "ROWS": ROWS, "KEYS": KEYS, "D": D},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(4)},
    )
    made = triton.compile(source, target=GPUTarget("cuda", 89, 32), options={"num_warps": 4, "num_stages": stages})
    shape = re.search(rf"memdesc<(\d+)x{KEYS}x{D}xf16, [^>]*mutable", made.asm["ttgir"])
    return int(shape[1])


found = {indirect: [buffers(indirect, stages) for stages in range(2, 8)] for indirect in (False, True)}
print(f"Triton {triton.__version__}, num_stages               2 3 4 5 6 7")
print("tiles in shared memory, numbers counted ", *found[False])
print("tiles in shared memory, numbers loaded  ", *found[True])
assert found[False] == [1, 2, 3, 4, 5, 6], "a direct loop has other buffers now"
halved = triton.__version__ != "3.4.0"
expected = [1, 1, 1, 2, 2, 3] if halved else found[False]
assert found[True] == expected, "a loop over loaded block numbers has other buffers now"
print(f"as seen before: block numbers that are loaded take {'half' if halved else 'none'} of the stages")
PY
for release in 3.4.0 3.6.0; do
  python3 -m venv "$folder/$release"
  "$folder/$release/bin/python" -m pip install -q setuptools "triton==$release"
  TRITON_CACHE_DIR="$folder/cache-$release" "$folder/$release/bin/python" "$folder/loop.py" || {
    echo "loops over loaded block numbers are no longer compiled as described"
    exit 1
  }
done
