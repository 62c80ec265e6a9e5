#!/usr/bin/env bash
# What becomes of eviction_policy of tl.load() and tl.store(). Up to Triton 3.3.1 it is a hint to L1 alone; from 3.4.0 on the same words
# are one to L2 too (createpolicy and L2::cache_hint). Of a load that the compiler pipelines, it vanishes without a word: its copies
# (cp.async) have no hint with 3.4.0 to 3.8.0, and with 3.9.0 only from sm_90 on, not on RTX 30, 40 or A100. So a policy that shows
# in a kernel of one stage does nothing in the loop it was meant for.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/policy.py" <<'PY'
import inspect
import json
import re
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def copy(x, out):
    i = tl.arange(0, 256)
    tl.store(out + i, tl.load(x + i, eviction_policy="evict_first"), eviction_policy="evict_last")


@triton.jit
def product(x, y, out, steps):
    i = tl.arange(0, 64)
    tile = i[:, None] * 64 + i
    acc = tl.zeros([64, 64], dtype=tl.float32)
    for step in range(steps):
        a = tl.load(x + step * 4096 + tile, eviction_policy="evict_last")
        b = tl.load(y + step * 4096 + tile, eviction_policy="evict_last")
        acc = tl.dot(a, b, acc)
    tl.store(out + tile, acc)


def ptx(kernel, types, arch, stages):
    constants = "constexprs" if "constexprs" in inspect.signature(ASTSource.__init__).parameters else "constants"
    source = ASTSource(kernel, signature=types, **{constants: {}})
    if constants == "constexprs":
        pointers = [i for i, kind in enumerate(types.values()) if kind.startswith("*")]
        source.attrs = {(i,): [["tt.divisibility", 16]] for i in pointers}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_stages": stages}).asm["ptx"]


def share(text, access):
    found = re.findall(rf"^.*{access}.*$", text, re.MULTILINE)
    return None if not found else sum("L2::cache_hint" in line for line in found) / len(found)


plain = ptx(copy, {"x": "*fp32", "out": "*fp32"}, 89, 1)
assert "L1::evict_first" in plain and "L1::evict_last" in plain
types = {"x": "*fp16", "y": "*fp16", "out": "*fp32", "steps": "i32"}
found = {"load": share(plain, r"ld\.global"), "store": share(plain, r"st\.global")}
if sys.argv[1] != "L1":
    found |= {"loop, 1 stage": share(ptx(product, types, 89, 1), r"ld\.global")}
    found |= {f"pipelined, sm_{arch}": share(ptx(product, types, arch, 3), r"cp\.async\.c[ag]") for arch in (89, 90, 120)}
print(f"Triton {triton.__version__}, share of accesses with a hint to L2: {json.dumps(found)}")
wanted = {"load": 0, "store": 0}
if sys.argv[1] != "L1":
    wanted = {"load": 1, "store": 1, "loop, 1 stage": 1, "pipelined, sm_89": 0}
    wanted |= {f"pipelined, sm_{arch}": float(sys.argv[1]) for arch in (90, 120)}
assert found == wanted, f"Triton {triton.__version__} treats eviction_policy in another way now"
PY
for release in 3.3.1:L1 3.4.0:0 3.8.0:0 3.9.0:1; do
  python3 -m venv "$folder/${release%:*}"
  "$folder/${release%:*}/bin/python" -m pip install -q setuptools "triton==${release%:*}"
  TRITON_CACHE_DIR="$folder/cache" "$folder/${release%:*}/bin/python" "$folder/policy.py" "${release#*:}" || {
    echo "eviction_policy is no longer compiled as described"
    exit 1
  }
done
