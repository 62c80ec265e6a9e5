"""Broken TurboDiffusion files against SLA2 Load SLA Model's reader and the real ComfyUI's file reader; prints counts as JSON.

python fuzz_sla_loader.py COMFYUI PACK FOLDER INPUTS
"""

import importlib.util
import json
import os
import pickle
import random
import sys
from collections import Counter
from pathlib import Path

import safetensors.torch
import torch

DIM = 4


def sound_state():
    state = {"net.patch_embedding.weight": torch.ones(8, 64), "net.blocks.0.attn_op.x": torch.ones(2)}
    for layer in range(2):
        name = f"net.blocks.{layer}.self_attn.attn_op.local_attn.proj_l"
        state |= {f"{name}.weight": torch.eye(DIM), f"{name}.bias": torch.zeros(DIM)}
    return state


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


NAME = "net.blocks.{}.self_attn.attn_op.local_attn.proj_l.{}"
# changes to a sound state, each of which must be refused
WRONG = {
    "a gap": {NAME.format(1, "weight"): None},
    "no bias": {NAME.format(1, "bias"): None},
    "a layer far away": {NAME.format(9999, "weight"): torch.eye(DIM)},
    "a layer beyond counting": {NAME.format(10**9, "weight"): torch.eye(DIM), NAME.format(1, "weight"): None},
    "not square": {NAME.format(0, "weight"): torch.ones(DIM, 3)},
    "another head_dim": {NAME.format(1, "weight"): torch.eye(8), NAME.format(1, "bias"): torch.zeros(8)},
    "a vector": {NAME.format(0, "weight"): torch.ones(DIM)},
    "empty": {
        NAME.format(n, kind): torch.ones(*shape) for n in (0, 1) for kind, shape in (("weight", (0, 0)), ("bias", (0,)))
    },
    "integers": {NAME.format(0, "weight"): torch.eye(DIM, dtype=torch.int64)},
    "NaN": {NAME.format(0, "weight"): torch.full((DIM, DIM), torch.nan)},
    "infinity": {NAME.format(1, "bias"): torch.full((DIM,), torch.inf)},
    "a layer twice": {
        NAME.format(0, "weight")[4:]: torch.eye(DIM),
        "a." + NAME.format(0, "weight")[4:]: torch.eye(DIM),
    },
    "a number for a tensor": {NAME.format(0, "weight"): 3},
    "quantised": {"net.blocks.0.self_attn.q.int8_weight": torch.zeros(1, dtype=torch.int8)},
    "nothing of SLA's": {NAME.format(n, kind): None for n in (0, 1) for kind in ("weight", "bias")},
}
NO_TABLE = {
    "a list": [torch.ones(2)],
    "a tensor": torch.ones(2),
    "a number": 3,
    "nothing": None,
    "an empty table": {},
    "a table of another kind": {"state_dict": [1]},
    "names that are numbers": {1: torch.ones(1), 2: 3},
}


def mutated(content, draw):
    changed, kind = bytearray(content), draw.randrange(4)
    if kind == 0:
        return bytes(changed[: draw.randrange(len(changed))])
    for _ in range(draw.randint(1, 6)):
        position = draw.choice([draw.randrange(len(changed)), draw.randrange(min(1200, len(changed)))])
        if kind == 1:
            changed[position] ^= 1 << draw.randrange(8)
        elif kind == 2:
            changed[position : position + draw.randrange(9)] = draw.randbytes(draw.randrange(9))
        else:
            end = draw.randrange(len(changed))
            changed[position:position] = changed[min(position, end) : max(position, end)][:64]
    return bytes(changed)


def load_pack(folder):
    spec = importlib.util.spec_from_file_location(
        "pack", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["pack"] = module
    spec.loader.exec_module(module)
    return importlib.import_module("pack.nodes.load_sla")


def main(comfyui, pack, folder, inputs):
    sys.path.insert(0, comfyui)
    loader, counts, failures = load_pack(Path(pack)), Counter(), []
    folder = Path(folder)

    def attempt(path, must_fail=None):
        before = path.read_bytes()
        try:
            _, weights = loader.read_checkpoint(str(path), path.name)
        except ValueError as error:
            counts["refused"] += 1
            if path.name not in str(error) or "\n" in str(error):
                failures.append(f"no single sentence with the name: {error!r}")
        else:
            counts["loaded"] += 1
            if must_fail or not all(torch.isfinite(t).all() for layer in weights.layers for t in layer):
                failures.append(f"loaded: {must_fail or 'not finite'}")
        if path.read_bytes() != before:
            failures.append("the file was changed")

    sound = {}
    for ending, save in ((".pth", torch.save), (".safetensors", safetensors.torch.save_file)):
        path = folder / f"sound{ending}"
        save(sound_state(), path)
        attempt(path)
        sound[ending] = path.read_bytes()
    if counts != {"loaded": 2}:
        failures.append("the sound files do not load")
    for name, change in WRONG.items():
        state = {key: value for key, value in (sound_state() | change).items() if value is not None}
        path = folder / "wrong.pth"
        torch.save(state, path)
        attempt(path, name)
    for name, thing in NO_TABLE.items():
        path = folder / "wrong.pth"
        torch.save(thing, path)
        attempt(path, name)
    mark = folder / "ran"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path = folder / "evil.pth"
        path.write_bytes(pickle.dumps(Evil(mark), protocol))
        attempt(path, "a pickle")
    for thing in (Evil(mark), sound_state() | {"net.x": Evil(mark)}):
        torch.save(thing, folder / "evil.pth")
        attempt(folder / "evil.pth", "a pickle in a zip")
    draw = random.Random(7)
    for number in range(inputs):
        ending = (".pth", ".safetensors")[number % 2]
        path = folder / f"fuzzed{ending}"
        path.write_bytes(mutated(sound[ending], draw))
        attempt(path)
    print(json.dumps({**counts, "tried": counts.total(), "code ran": mark.exists(), "failures": failures[:20]}))


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))
