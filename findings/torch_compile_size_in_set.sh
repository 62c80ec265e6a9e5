#!/usr/bin/env bash
# torch 2.13.0, on a CPU: torch.compile(dynamic=True) compiles another branch than Python takes, without a word. Once a size of a
# tensor has been put into a set, as in len({q.shape[-1], k.shape[-1]}) == 1, a later "tuple(w.shape) in (...)" of sizes is traced as
# False although the sizes are equal. The same test written with == is traced rightly, and so is "in" where no set was made before.
# Code that checks the shapes of its arguments then refuses right ones, or leaves out a branch, under torch.compile alone.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip "$@"; }
pip install -q torch==2.13.0 numpy==2.3.5
cat > "$folder/branch.py" <<'PY'
import torch


def with_set(q, w):
    sizes = {q.shape[-1]}
    return w if tuple(w.shape) in ((q.shape[-1], q.shape[-1]),) else -w


def with_set_and_equality(q, w):
    sizes = {q.shape[-1]}
    return w if any(tuple(w.shape) == shape for shape in ((q.shape[-1], q.shape[-1]),)) else -w


def without_set(q, w):
    return w if tuple(w.shape) in ((q.shape[-1], q.shape[-1]),) else -w


q, w = torch.ones(5, 16), torch.ones(16, 16)
for function, agrees in ((with_set, False), (with_set_and_equality, True), (without_set, True)):
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        compiled = torch.compile(function, dynamic=True, fullgraph=True, backend=backend)
        plain, found = function(q, w)[0, 0].item(), compiled(q, w)[0, 0].item()
        print(f"{function.__name__}, backend {backend}: {plain:+.0f} in Python, {found:+.0f} compiled")
        assert (plain == found) == agrees, "it is traced otherwise now"
print("as seen before: a set of sizes changes what 'in' is compiled to")
PY
"$folder/venv/bin/python" -W ignore "$folder/branch.py" || { echo "torch.compile no longer takes the other branch"; exit 1; }
