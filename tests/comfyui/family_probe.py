"""Runs in a process of its own, with one ComfyUI on the path: every family of family_models.py plain, at sparsity 0 and
sparse, and prints one line of JSON. Started by test_families.py:

    python family_probe.py COMFYUI REPOSITORY [FAMILY ...]
"""

import json
import sys
import traceback
from pathlib import Path

comfyui, repository, *wanted = sys.argv[1:]
sys.argv = sys.argv[:1]
sys.path.insert(0, comfyui)

from comfy.cli_args import args

args.cpu = True

import comfy.model_patcher
import comfy.ops
import torch
from family_models import FAMILIES, build, class_of, inputs_for
from model_host import Host, pack_loader, sample
from own_attention_contract import OwnAttention

pack_module = pack_loader(Path(repository))


def counting(calls):
    """An override below ours: every attention call that reaches ComfyUI's own attention, by its token counts."""

    def override(func, q, k, *args, **kwargs):
        calls.append((q.shape[-2], k.shape[-2]))
        return func(q, k, *args, **kwargs)

    return override


def probe(name):
    path, arguments, inputs, *_ = FAMILIES[name]
    cls = class_of(path)
    if cls is None:
        return {"missing": True}
    hook, settings = pack_module("nodes.patching"), pack_module("nodes.settings")
    model = build(cls, arguments, comfy.ops.disable_weight_init)
    patcher = comfy.model_patcher.ModelPatcher(Host(model), torch.device("cpu"), torch.device("cpu"))
    inputs = inputs_for(cls, inputs)
    plain_calls = []
    patcher.model_options["transformer_options"]["optimized_attention_override"] = counting(plain_calls)
    plain = sample(patcher, inputs)
    del patcher.model_options["transformer_options"]["optimized_attention_override"]
    found = {"family": pack_module("nodes.model_layouts").unsupported_model_reason(model), "calls": len(plain_calls)}
    for key, sparsity in (("exact", 0.0), ("sparse", 0.7)):
        made = settings.AttentionSettings(sparsity=sparsity, bit_width="16bit", minimum_tokens=0)
        patched = hook.install(patcher, made, None)
        with OwnAttention(model, sparsity == 0.0) as own:
            out = sample(patched, inputs)
        (run,) = patched.get_attachment("sla2").runs.finished()
        found[key] = {
            "difference": ((out - plain).norm() / plain.norm()).item(),
            "finite": bool(torch.isfinite(out).all()),
            "sparse": sum(record.sparse for record in run.layers.values()),
            "layers": len(run.layers),
            "dense": sum((list(record.dense.elements()) for record in run.layers.values()), []),
            "unreached": sum(record.unreached for record in run.layers.values()),
            "other": run.other_calls,
            "model_calls": run.model_calls,
            "own attention": own.preferred,
            "past own attention": own.other,
            "sparsity": [record.sparsity for record in run.layers.values()],
        }
    again = sample(patcher, inputs)
    found["plain again"] = bool(torch.equal(plain, again))
    return found


def attempt(name):
    try:
        return probe(name)
    except Exception:  # reported to the test of this family; the others still run
        return {"error": traceback.format_exc()}


print(json.dumps({name: attempt(name) for name in wanted or FAMILIES}))
