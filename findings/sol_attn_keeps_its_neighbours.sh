#!/usr/bin/env bash
# comfy-kitchen 0.2.40, sol_attn: topk_ratio is documented as the fraction of key blocks kept per query block, "SLA-style top-k".
# Its own block and both neighbours are kept as well, so that short sequences keep several times the fraction asked for.
# A comparison with another top-k method at "the same ratio" compares unlike numbers of blocks.
# How it is seen: with tail=False the output depends on the kept blocks alone. V holds one number per key block, so that what
# a query block gets from each block can be read off its output.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip "$@"; }
pip install -q torch==2.13.0 numpy==2.3.5 packaging==25.0
pip install -q --no-deps comfy-kitchen==0.2.40
"$folder/venv/bin/python" - <<'PY' || { echo "sol_attn no longer behaves as described"; exit 1; }
import torch
from comfy_kitchen.backends.eager.sol_attn import sol_attn

BLOCKS, BLOCK, DIM = 16, 64, 128
torch.manual_seed(0)
q, k = (torch.randn(1, BLOCKS * BLOCK, 1, DIM) for _ in range(2))
v = torch.zeros(1, BLOCKS * BLOCK, 1, DIM)
for block in range(BLOCKS):  # channel j tells how much comes from key block j
    v[:, block * BLOCK : (block + 1) * BLOCK, :, block] = 1
print("asked for  blocks kept per query block (of 16)")
for asked in (1, 2, 4):
    out = sol_attn(q, k, v, topk_ratio=asked / BLOCKS, tail=False)
    weights = out[0, :, 0, :BLOCKS].unflatten(0, (BLOCKS, BLOCK)).sum(dim=1)
    kept = weights > 1e-6
    print(f"{asked:9d}  {kept.sum(dim=1).tolist()}")
    place = torch.arange(BLOCKS)
    assert kept[(place[:, None] - place).abs() <= 1].all(), "a query block lacks its own block or a neighbour"
    if asked == 1:
        assert kept.sum(dim=1).float().mean() > 2.5, "no more blocks than were asked for"
print("as seen before: the own block and both neighbours are kept whatever topk_ratio says")
PY
