#!/usr/bin/env bash
# Triton 3.6.0, compiled for sm_89: TRITON_DISABLE_LINE_INFO=1 changes the machine code, not only the debug information. Line
# information puts labels ($L__tmp0:) into the PTX where the code of an inlined function begins and ends. Nothing jumps to them,
# but ptxas allocates registers and orders instructions differently with them; `.loc` changes nothing. So what is read off a
# binary or measured with the one setting need not hold with the other. Shown: normal random numbers, 512 to a warp; the
# instructions are the same ones in another order and partly in other registers. 3.9.0 does the same. Most small kernels that
# were tried come out alike.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q triton==3.6.0
cat > "$folder/noise.py" <<'PY'
import sys
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def noise(x, out, seed, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(out + at, tl.load(x + at) * tl.randn(seed, at))


source = ASTSource(
    noise, signature={"x": "*fp32", "out": "*fp32", "seed": "i32", "COUNT": "constexpr"}, constexprs={"COUNT": 512},
    attrs={(i,): [["tt.divisibility", 16]] for i in range(2)},
)
made = triton.compile(source, target=GPUTarget("cuda", 89, 32), options={"num_warps": 1})
Path(sys.argv[1]).with_suffix(".ptx").write_text(made.asm["ptx"])
Path(sys.argv[1]).with_suffix(".cubin").write_bytes(made.asm["cubin"])
PY
cat > "$folder/compare.py" <<'PY'
import re
import subprocess
import sys
from pathlib import Path

import triton

folder = Path(sys.argv[1])
tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
LOC, LABEL = r"(?m)^\s*\.(?:loc|file)\s.*\n", r"(?m)^\$L__(?:tmp|func)\w*:.*\n"


def instructions(cubin):
    said = subprocess.run([tools / "cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True).stdout
    return re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(.*?;)", said)


def assembled(ptx):
    (folder / "edited.ptx").write_text(ptx)
    options = ["-lineinfo", "--gpu-name=sm_89", folder / "edited.ptx", "-o", folder / "edited.cubin"]
    subprocess.run([tools / "ptxas", *options], check=True)
    return instructions(folder / "edited.cubin")


def code(ptx):
    """The lines of a PTX that are neither debug information nor comments."""
    ptx = re.sub(LABEL, "", re.sub(LOC, "", ptx.partition("\t.section")[0]))
    ptx = re.sub(r", debug|//.*", "", ptx)
    return [line.strip() for line in ptx.splitlines() if line.strip()]


with_lines, without = ((folder / name).with_suffix(".ptx").read_text() for name in ("0", "1"))
first, second = (instructions((folder / name).with_suffix(".cubin")) for name in ("0", "1"))
labels = len(re.findall(LABEL, with_lines))
print(f"labels that nothing jumps to: {labels} with line information, {len(re.findall(LABEL, without))} without")
print(f"instructions: {len(first)} and {len(second)}, unlike in {sum(a != b for a, b in zip(first, second))} places, the first:")
for a, b in [pair for pair in zip(first, second) if pair[0] != pair[1]][:3]:
    print(f"    {a:45} {b}")
assert code(with_lines) == code(without), "the PTX differs in more than debug information"
assert first != second, "both settings give the same machine code"
whole = with_lines.partition("\t.section")[0]
assert assembled(re.sub(LOC, "", whole)) == first, "the .loc directives matter"
assert assembled(re.sub(LABEL, "", re.sub(LOC, "", whole))) == second, "it is not the labels"
print("as seen before: the same PTX but for labels, and other machine code")
PY
for disabled in 0 1; do
    TRITON_DISABLE_LINE_INFO=$disabled TRITON_CACHE_DIR="$folder/cache$disabled" \
        "$folder/venv/bin/python" "$folder/noise.py" "$folder/$disabled"
done
"$folder/venv/bin/python" "$folder/compare.py" "$folder" || { echo "line information no longer acts as described"; exit 1; }
