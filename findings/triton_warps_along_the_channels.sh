#!/usr/bin/env bash
# Triton 3.6.0, compiled for sm_89: an attention tile whose output has more channels than query rows (64 rows of 128 channels,
# the usual tile on RTX cards) lays its warps out along the channels, not along the rows: every warp then has all rows. The
# row maximum and sum cross warps through shared memory, and so does P on its way into the second product. With 128 rows
# each warp owns whole rows. Counted per pass through the loop: barriers and shared-memory stores.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q triton==3.6.0
cat > "$folder/attend.py" <<'PY'
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

KEYS, D = 64, 128


@triton.jit
def attend(q, k, v, out, count, ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr):
    row, key, d = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, D)
    a = tl.load(q + row[:, None] * D + d)
    total, highest, mass = tl.zeros([ROWS, D], tl.float32), tl.full([ROWS], -1e30, tl.float32), tl.zeros([ROWS], tl.float32)
    for i in range(count):
        scores = tl.dot(a, tl.load(k + (i * KEYS + key)[None, :] * D + d[:, None]))
        new = tl.maximum(highest, tl.max(scores, axis=1))
        p = tl.exp2(scores - new[:, None])
        scale = tl.exp2(highest - new)
        mass, highest = mass * scale + tl.sum(p, axis=1), new
        total = tl.dot(p.to(tl.float16), tl.load(v + (i * KEYS + key)[:, None] * D + d), total * scale[:, None])
    tl.store(out + row[:, None] * D + d, total / mass[:, None])


def compiled(rows, warps):
    names = ("q", "k", "v", "out", "count", "ROWS", "KEYS", "D")
    types = ("*fp16", "*fp16", "*fp16", "*fp32", "i32", "constexpr", "constexpr", "constexpr")
    source = ASTSource(
        attend, signature=dict(zip(names, types)), constexprs={"ROWS": rows, "KEYS": KEYS, "D": D},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(4)},
    )
    made = triton.compile(source, target=GPUTarget("cuda", 89, 32), options={"num_warps": warps, "num_stages": 2})
    layout = re.search(r"nvidia_mma<\{versionMajor = 2[^>]*warpsPerCTA = \[(\d+), (\d+)\]", made.asm["ttgir"])
    ptx = made.asm["ptx"]
    # the loop: from the label that the last backward branch jumps to
    label, end = max(((m[1], m.start()) for m in re.finditer(r"bra(?:\.uni)?\s+(\$L__BB0_\d+);", ptx)
                      if ptx.index(f"{m[1]}:") < m.start()), key=lambda pair: pair[1])
    body = ptx[ptx.index(f"{label}:") : end]
    return (int(layout[1]), int(layout[2])), body.count("bar.sync"), len(re.findall(r"st\.shared", body))


found = {(rows, warps): compiled(rows, warps) for rows in (64, 128) for warps in (4, 8)}
print("rows, warps   warps along rows x channels   barriers   stores to shared memory")
for (rows, warps), ((along, across), barriers, stores) in found.items():
    print(f"{rows:4} {warps:6} {along:18} x {across} {barriers:20} {stores:12}")
for warps in (4, 8):
    assert found[64, warps][0] == (1, warps), "64 rows of 128 channels have another layout now"
    assert found[128, warps][0] == (warps, 1), "128 rows of 128 channels have another layout now"
    assert found[64, warps][1] > 2 * found[128, warps][1] and found[64, warps][2] > found[128, warps][2]
print("as seen before: with fewer rows than channels, warps share rows")
PY
TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" "$folder/attend.py" || { echo "such a loop is no longer compiled as described"; exit 1; }
