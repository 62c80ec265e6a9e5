#!/usr/bin/env bash
# Triton 3.9.0, TRITON_INTERPRET=1: `.to()` from float32 does not round as a card does.
# - float8e4nv and float8e5: a number that rounds up to the next power of two becomes half of it (127.4 -> 64, not 128).
# - float8e4nv: what is beyond 448 wraps (-10000 -> -320), where the conversion of a card saturates at -448.
# - bfloat16: the lower 16 bits are cut off, where a card rounds to the nearest.
# float16 is right. So a kernel that is right fails against a reference in the interpreter, or passes there with wide bounds.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip "$@"; }
pip install -q torch==2.13.0 numpy==2.3.5
pip install -q --no-deps triton==3.9.0
cat > "$folder/casts.py" <<'PY'
import torch
import triton
import triton.language as tl


@triton.jit
def cast(x, out, FORMAT: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at).to(FORMAT))


def by_triton(x, dtype, name):
    out = torch.empty(len(x), dtype=dtype)
    cast[(1,)](x, out, name, len(x))
    return out.float()


torch.manual_seed(0)
x = 100 * torch.randn(4096)
formats = {
    torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e5m2: tl.float8e5, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16,
}
print("of 4096 numbers, unlike torch's rounding to the nearest; their values over torch's, smallest and largest")
for dtype, name in formats.items():
    found, expected = by_triton(x, dtype, name), x.to(dtype).float()
    wrong = found != expected
    if not wrong.any():
        print(f"{dtype}: 0")
        assert dtype == torch.float16, f"{dtype} rounds to the nearest now"
        continue
    share = (found / expected)[wrong]
    print(f"{dtype}: {wrong.sum()}, {share.min():.4f} to {share.max():.4f}")
    if dtype == torch.bfloat16:
        cut = (x.view(torch.int32) & -65536).view(torch.float32)
        assert torch.equal(found, cut), "bfloat16 is not cut off any more"
    else:
        assert (share == 0.5).all(), "the difference is another than half a power of two"
        power = torch.frexp(expected[wrong])[0].abs()
        assert (power == 0.5).all(), "numbers other than powers of two are wrong"
large = torch.tensor([-10000.0] * 16)
print("-10000 as float8e4nv:", by_triton(large, torch.float8_e4m3fn, tl.float8e4nv)[0].item())
assert by_triton(large, torch.float8_e4m3fn, tl.float8e4nv)[0] != -448, "float8e4nv saturates now"
print("as seen before")
PY
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/casts.py" || { echo "Triton's interpreter no longer casts as described"; exit 1; }
