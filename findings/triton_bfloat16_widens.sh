#!/usr/bin/env bash
# bfloat16 to float32 is a shift, so two numbers in a register of 32 bits should take two instructions: a shift for the lower one, an AND
# for the upper. What Triton writes, a conversion of each 16-bit half, takes three in ptxas (Triton 3.4, 3.6 and 3.9, for sm_89 and sm_90):
# the upper half is first moved down (PRMT) and then shifted up again. The same two instructions as inline assembly with pack=2 have
# the same bits and save half an instruction a number. Counted in a kernel that writes 64 numbers a thread as float32.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/widen.py" <<'PY'
import collections
import re
import subprocess
import sys
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

NUMBERS = 64  # of a thread


@triton.jit
def widen(x, out, BY_HAND: tl.constexpr):
    i = tl.arange(0, 128 * 64)
    loaded = tl.load(x + i)
    if BY_HAND:
        code: tl.constexpr = "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
        wide = tl.inline_asm_elementwise(code, "=r,=r,r", [loaded], dtype=tl.float32, is_pure=True, pack=2)
    else:
        wide = loaded.to(tl.float32)
    tl.store(out + i, wide)


def instructions(by_hand, arch):
    """{name: how often it stands in the code}, of what neither loads, stores nor computes addresses."""
    source = ASTSource(
        widen, signature={"x": "*bf16", "out": "*fp32", "BY_HAND": "constexpr"}, constexprs={(2,): by_hand}
    )
    source.attrs = {(i,): [["tt.divisibility", 16]] for i in range(2)}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4})
    path = Path(sys.argv[1]) / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    code = subprocess.run([tool, "-sass", path], capture_output=True, text=True, check=True).stdout
    names = re.findall(r"/\*[0-9a-f]{4}\*/ +(?:@!?U?P\w+ +)?(\w+)", code)
    return len(names) - names.count("NOP"), collections.Counter(names)


for arch in (89, 90):
    (plain, names), (by_hand, others) = (instructions(kind, arch) for kind in (False, True))
    moved = names["PRMT"] - others["PRMT"]
    print(f"Triton {triton.__version__}, sm_{arch}: {plain} instructions, {by_hand} by hand; PRMT {names['PRMT']}, {others['PRMT']}")
    assert moved >= NUMBERS // 2 and plain - by_hand >= NUMBERS // 3
PY
for release in 3.4.0 3.6.0 3.9.0; do
  python3 -m venv "$folder/$release"
  "$folder/$release/bin/python" -m pip install -q setuptools "triton==$release"
  TRITON_CACHE_DIR="$folder/cache" "$folder/$release/bin/python" "$folder/widen.py" "$folder" || {
    echo "Triton and ptxas no longer widen bfloat16 as described"
    exit 1
  }
done
