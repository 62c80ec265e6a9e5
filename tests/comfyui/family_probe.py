"""Runs in a process of its own, with one ComfyUI on the path: every family of family_models.py plain, at sparsity 0 and
sparse, and prints one line of JSON. Started by test_families.py:

    python family_probe.py COMFYUI REPOSITORY [FAMILY ...]
"""

import json
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path

comfyui, repository, *wanted = sys.argv[1:]
sys.argv = sys.argv[:1]
sys.path.insert(0, comfyui)

from comfy.cli_args import args

args.cpu = True

import comfy.model_patcher
import comfy.ops
import torch
from container_contract import CONTAINER, Containers
from family_models import FAMILIES, RECORDED, build, class_of, inputs_for
from model_host import Host, pack_loader, sample
from own_attention_contract import OwnAttention
from recorded_scopes import RecordedScopes

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
    hook, settings = pack_module("nodes.attention.patching"), pack_module("nodes.settings.values")
    model = build(cls, arguments, comfy.ops.disable_weight_init)
    patcher = comfy.model_patcher.ModelPatcher(Host(model), torch.device("cpu"), torch.device("cpu"))
    inputs = inputs_for(cls, inputs)
    plain_calls = []
    patcher.model_options["transformer_options"]["optimized_attention_override"] = counting(plain_calls)
    plain = sample(patcher, inputs)
    del patcher.model_options["transformer_options"]["optimized_attention_override"]
    found = {
        "family": pack_module("nodes.attention.model_families").unsupported_model_reason(model),
        "calls": len(plain_calls),
    }
    for key, sparsity in (("exact", 0.0), ("sparse", 0.7)):
        made = settings.AttentionSettings(sparsity=sparsity, precision="16bit", minimum_tokens=0)
        patched = hook.install(patcher, made, None)
        with OwnAttention(model, sparsity == 0.0) as own, Containers() if sparsity else nullcontext() as containers:
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
            "in containers": containers and CONTAINER and [containers.calls, containers.kept],
            "sparsity": [record.sparsity for record in run.layers.values()],
        }
    again = sample(patcher, inputs)
    found["plain again"] = bool(torch.equal(plain, again))
    return found


def left_in_scopes(name, ratio_mode):
    """What is left of recorded scopes in a run of three steps with a router or fitted ratios, and a map: {"block": storages, "call": ...}."""
    path, arguments, inputs, *_ = FAMILIES[name]
    cls = class_of(path)
    model = build(cls, arguments, comfy.ops.disable_weight_init)
    patched = comfy.model_patcher.ModelPatcher(Host(model), torch.device("cpu"), torch.device("cpu"))
    if ratio_mode:
        patched = with_router_and_maps(
            patched, ratio_mode, pack_module("nodes.attention.model_families").model_facts(model)
        )
    scopes = RecordedScopes(model, getattr(model, RECORDED[name]))
    inputs = inputs_for(cls, inputs)
    hook = patched.get_attachment("sla2")
    if hook is not None:
        hook.begin_run(patched)
    with scopes.watching():
        for sigma in (1.0, 0.5, 0.25):
            sample(patched, inputs, sigma)
    if hook is not None:
        hook.end_run()
        (run,) = hook.runs.finished()
        assert all(record.sparse == 3 and record.ratio_range for record in run.layers.values()) and len(run.layers) == 2
        assert len(run.maps.shares) == 2 * 3
        assert all((record.attention_error is not None) == (ratio_mode == "fitted") for record in run.layers.values())
    return scopes.left


def with_router_and_maps(patcher, ratio_mode, facts):
    """SLA2 on it as it has most to keep: learned projections, ratios learned or fitted, a schedule, and a report that wants maps."""
    hook, settings = pack_module("nodes.attention.patching"), pack_module("nodes.settings.values")
    weights, schedule = pack_module("sla2_kernels.weights"), pack_module("nodes.settings.schedule")
    pack_module("nodes.runs.record").wanted_maps = pack_module("nodes.runs.routing_maps").RoutingMaps
    proj = torch.eye(facts.head_dim)
    layer = weights.RouterLayer(proj, proj, torch.zeros(1, facts.num_heads, 1))
    router = weights.RouterWeights(
        (layer,) * facts.num_layers, facts.layout.family, facts.num_heads, facts.head_dim, sparsities=(0.7,)
    )
    rules = schedule.parse_schedule("0%-100%: 0.5 -> 0.7", facts.num_layers, settings.parse_layers)
    made = settings.AttentionSettings(
        sparsity=0.7, precision="16bit", ratio_mode=ratio_mode, minimum_tokens=0, schedule=rules
    )
    return hook.install(patcher, made, router)


def attempt(name):
    try:
        return probe(name)
    except Exception:  # reported to the test of this family; the others still run
        return {"error": traceback.format_exc()}


found = {name: attempt(name) for name in wanted or FAMILIES}
for name in RECORDED.keys() & {name for name, one in found.items() if "calls" in one}:
    found[name]["left"] = [left_in_scopes(name, ratio_mode) for ratio_mode in (None, "learned", "fitted")]
print(json.dumps(found))
