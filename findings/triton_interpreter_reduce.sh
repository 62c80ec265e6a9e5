#!/usr/bin/env bash
# Triton 3.6.0, TRITON_INTERPRET=1: tl.reduce with a function of one's own calls that function for every number of a tile, with two
# scalars: a tile of 64 x 64 along one axis is 4,032 calls of Python, though its operations work on whole arrays as well. tl.max,
# tl.min, tl.sum, tl.argmax and tl.argmin alone go to NumPy, told apart by the identity of Triton's own functions: a function of
# one's own that does the same as tl.sum's is not. So a few reductions can be nearly all of the time that the interpreter takes.
# 3.2.0 and 3.8.0 do the same.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip "$@"; }
pip install -q torch==2.13.0 numpy==2.4.6
cat > "$folder/reduce.py" <<'PY'
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def own(x, y):
    return x + y


@triton.jit
def sums(x, out, OWN: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tile = tl.load(x + i[:, None] * SIZE + i[None, :])
    if OWN:
        found = tl.reduce(tile, 1, own)
    else:
        found = tl.sum(tile, axis=1)
    tl.store(out + i, found)


shapes = []


def watch(frame, event, argument):
    if event == "call" and frame.f_code.co_name == "own":
        shapes.append(tuple(frame.f_locals["x"].shape))


x, found = torch.arange(4096.0).view(64, 64), {}
for by_own in (True, False):
    found[by_own] = torch.zeros(64)
    shapes.clear()
    sys.setprofile(watch)
    sums[(1,)](x, found[by_own], OWN=by_own, SIZE=64)
    sys.setprofile(None)
    name = "a function of one's own" if by_own else "tl.sum"
    print(f"triton {triton.__version__}: {name}: {len(shapes)} calls, shapes {set(shapes) or 'none'}")
print("equal:", torch.equal(found[True], found[False]), torch.equal(found[True], x.sum(1)))
PY
for version in 3.6.0 3.2.0 3.8.0; do
    pip install -q --no-deps triton==$version
    TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/reduce.py" | tee "$folder/said"
    grep -q "own: 4032 calls, shapes {()}" "$folder/said" && grep -q "tl.sum: 0 calls" "$folder/said" &&
        grep -q "equal: True True" "$folder/said" || { echo "the interpreter no longer reduces as described"; exit 1; }
done
echo "as seen before: a reduction by a function of one's own calls it for every number"
