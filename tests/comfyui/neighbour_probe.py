"""Runs in a process of its own, with ComfyUI on the path: SLA2 beside stand-ins for other nodes, on ComfyUI's own classes.
Prints one line of JSON, {case: what it found}. Started by test_neighbour_models.py:

    python neighbour_probe.py COMFYUI REPOSITORY WEIGHTS
"""

import inspect
import json
import sys
import traceback
from pathlib import Path

comfyui, repository, weights, *names = sys.argv[1:]
sys.argv = sys.argv[:1]
sys.path.insert(0, comfyui)

from comfy.cli_args import args

args.cpu = True

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sample
import comfy.sd
import torch
from core_sparse import CoreSparse
from family_models import FAMILIES, build, class_of, inputs_for
from model_host import Host, pack_loader, sample

pack_module = pack_loader(Path(repository))
patching, settings = pack_module("nodes.attention.patching"), pack_module("nodes.settings.values")
families, report_text = pack_module("nodes.attention.model_families"), pack_module("nodes.runs.report_text")
OVERRIDE = "optimized_attention_override"
STEPS = 2
CASES = []


def case(function):
    CASES.append(function)
    return function


def wan():
    return comfy.sd.load_diffusion_model(weights)


def sla2(model, **changes):
    chosen = {"sparsity": 0.75, "precision": "16bit", "minimum_tokens": 0} | changes
    return patching.install(model, settings.AttentionSettings(**chosen), None)


def run(model, steps=STEPS):
    """One sampling of 192 tokens, as the KSampler node does it."""
    text = torch.randn(1, 16, 4096, generator=torch.Generator().manual_seed(1)) * 0.1
    latent = torch.zeros(1, 16, 3, 16, 16)
    with torch.inference_mode():
        return comfy.sample.sample(
            model,
            torch.randn(latent.shape, generator=torch.Generator().manual_seed(2)),
            steps,
            1.0,
            "euler",
            "simple",
            [[text, {}]],
            [[text, {}]],
            latent,
            disable_pbar=True,
            seed=3,
        )


def found(model, core=None):
    """What the newest run of a model says; core: CoreSparse."""
    hook = model.get_attachment("sla2")
    (*_, record) = hook.runs.finished()
    return {
        "sparse": sum(layer.sparse for layer in record.layers.values()),
        "dense": [reason for layer in record.layers.values() for reason in layer.dense.elements()],
        "notes": list(record.notes),
        "model calls": record.model_calls,
        "answered": record.answered_calls,
        "text": report_text.report_text(hook, record),
        "core": core and core.calls,
    }


def stopped(sampling):
    """The sentence that a sampling stops with, or None."""
    try:
        sampling()
    except RuntimeError as error:
        return str(error)
    return None


def h3():
    path, arguments, inputs, *_ = FAMILIES["minimax-h3"]
    cls = class_of(path)
    model = build(cls, arguments, comfy.ops.disable_weight_init)
    patcher = comfy.model_patcher.ModelPatcher(Host(model), torch.device("cpu"), torch.device("cpu"))
    patcher.model_options.setdefault("transformer_options", {})
    return patcher, lambda patched: [sample(patched, inputs_for(cls, inputs)) for _ in range(STEPS)]


def tells_options_to_callbacks():
    """Whether callbacks before each step get the options (from ComfyUI 0.23 on)."""
    return len(inspect.signature(comfy.model_patcher.ModelPatcher.prepare_state).parameters) > 2


def two_sparse_nodes(model, sampling):
    core = CoreSparse()
    ours_last = sla2(core.place(model), dense_layers=frozenset({0}))
    sampling(ours_last)
    first = found(ours_last, core)
    core = CoreSparse()
    core_last = core.place(sla2(model))
    sampling(core_last)
    second = found(core_last, core)
    core = CoreSparse()
    stop = stopped(lambda: sampling(core.place(sla2(model, stop_on_unsupported=True))))
    ours_stops = stopped(lambda: sampling(sla2(core.place(model), stop_on_unsupported=True)))
    stopping = core.place(sla2(model, stop_on_unsupported=True))
    twice = [stopped(lambda: sampling(stopping)) for _ in range(2)]
    return {
        "ours last": first,
        "core last": second,
        "stop": stop,
        "core ran": core.calls,
        "ours stops": ours_stops,
        "stopped runs": len(stopping.get_attachment("sla2").runs.finished()),
        "each": len(set(twice)) == 1,
    }


@case
def core_sparse_on_wan():
    return two_sparse_nodes(wan(), run) if tells_options_to_callbacks() else None


@case
def core_sparse_on_h3():
    return two_sparse_nodes(*h3()) if class_of(FAMILIES["minimax-h3"][0]) else None


@case
def a_router_trained_beside_core_sparse():
    training, options = pack_module("nodes.training.router_training"), pack_module("sla2_training").TrainerOptions
    core = CoreSparse()
    model = core.place(wan())
    facts = families.facts_of(model)
    trainer = training.make_trainer(facts, (0.75,), options(), None)
    trained = training.RouterTraining(model, facts, trainer, training.Schedule(1, STEPS), print)
    run(trained.model)
    return {"core": core.calls, "layers": len(trainer.steps)}


@case
def core_sparse_between_two_of_ours_and_another_pack():
    """A pack's override lies below core's and stays; one that holds core's goes with it."""
    lower, core = [], CoreSparse()
    model = wan()
    model.model_options["transformer_options"][OVERRIDE] = lambda func, *a, **k: lower.append(1) or func(*a, **k)
    between = sla2(core.place(sla2(model)), dense_layers=frozenset({0}))
    run(between)
    one = found(between, core) | {"lower": len(lower)}
    held = core.place(model)
    inner = held.model_options["transformer_options"][OVERRIDE]

    def holder(func, *args, **kwargs):
        return inner(func, *args, **kwargs)

    held.model_options["transformer_options"][OVERRIDE] = holder
    patched = sla2(held)
    run(patched)
    return {"between": one, "held": found(patched, core)}


@case
def a_pack_that_puts_itself_in_front_again():
    """Placed before ours: it is below ours in every step, not in front."""
    if not tells_options_to_callbacks():
        return None
    state, order = CoreSparse(), []
    model = wan().clone()

    def on_top(options):
        previous = options.get(OVERRIDE)
        if previous in state.made:
            return

        def override(func, *args, **kwargs):
            order.append(args[0].shape[1])
            state.calls += 1
            below = func if previous is None else lambda *a, **k: previous(func, *a, **k)
            return below(*args, **kwargs)

        state.made.append(override)
        options[OVERRIDE] = override

    on_top(model.model_options["transformer_options"])
    model.add_callback_with_key("on_prepare_state", "pack", lambda p, t, o: on_top(o["transformer_options"]))
    patched = sla2(model)
    run(patched)
    # the cross-attention alone comes to it: a sparse self-attention never does
    return found(patched, state)


def past_the_wrappers(model, options_given=lambda options: options, cached=()):
    """Another pack's forward, in place of the diffusion model's: ComfyUI's wrappers next to the model are not entered."""
    calls = []

    def pack_forward(x, timestep, context, transformer_options=None, **kwargs):
        calls.append(x)
        kwargs.pop("control", None)
        if len(calls) in cached:
            return x
        owner = model.model.diffusion_model
        return owner._forward(x, timestep, context, transformer_options=options_given(transformer_options), **kwargs)

    patched = model.clone()
    patched.add_object_patch("diffusion_model.forward", pack_forward)
    return patched


@case
def another_packs_forward():
    plain, model = wan(), wan()
    ours = sla2(plain)
    alone = run(ours)
    results = {}
    for name, given, cached in (
        ("passes options", lambda o: o, ()),
        ("passes none", lambda o: {}, ()),
        ("caches", lambda o: o, (2,)),
    ):
        patched = past_the_wrappers(sla2(model), given, cached)
        latent = run(patched)
        results[name] = found(patched) | {"equal": bool(torch.equal(latent, alone))}
    caught = past_the_wrappers(sla2(model, stop_on_unsupported=True), cached=(1, 2))
    results["stop"] = stopped(lambda: run(caught))
    return results


@case
def a_guider_that_calls_the_model_itself():
    """It knows none of ComfyUI's wrappers: nothing says where the video lies."""
    results = {}
    for name, stop in (("dense", False), ("stop", True)):
        patched = past_the_wrappers(sla2(wan(), stop_on_unsupported=stop))

        def call(patched=patched):
            with torch.inference_mode():
                patched.patch_model()
                options = dict(patched.model_options["transformer_options"])
                inputs = torch.zeros(1, 16, 3, 16, 16), torch.tensor([500.0]), torch.zeros(1, 16, 4096)
                patched.model.diffusion_model(*inputs, transformer_options=options)

        results[name] = stopped(call) if stop else call() or found(patched)
    return results


@case
def model_calls_that_come_to_no_mark():
    results = {}
    replaced = sla2(wan(), stop_on_unsupported=True)
    for layer in range(3):
        replaced.set_model_patch_replace(lambda args, extra: {"img": args["img"]}, "dit", "double_block", layer)
    results["blocks replaced, stop"] = stopped(lambda: run(replaced))
    replaced = sla2(wan())
    for layer in range(3):
        replaced.set_model_patch_replace(lambda args, extra: {"img": args["img"]}, "dit", "double_block", layer)
    run(replaced)
    results["blocks replaced"] = found(replaced)
    both, other, calls = sla2(wan()), wan(), []
    comfy.model_management.load_models_gpu([other])

    def dual(apply, called):
        calls.append(1)
        chosen = apply if len(calls) % 2 else other.model.apply_model
        return chosen(called["input"], called["timestep"], **called["c"])

    both.set_model_unet_function_wrapper(dual)
    run(both)
    results["two models"] = found(both)
    bare = sla2(wan()).clone()
    bare.object_patches = {}
    run(bare)
    results["marks taken off"] = found(bare)
    return results


@case
def another_packs_self_attention():
    """It replaces the forward of the self-attention after ours, as packs that scale its output do."""
    patched = sla2(wan())
    for layer in range(3):
        module, name = patched.model.diffusion_model.blocks[layer].self_attn, f"blocks.{layer}.self_attn.forward"

        def scaled(*args, module=module, **kwargs):
            return 1.01 * type(module).forward(module, *args, **kwargs)

        patched.add_object_patch(f"diffusion_model.{name}", scaled)
    run(patched)
    return found(patched)


@case
def what_another_model_put_into_the_live_one():
    results = {}
    attention = "diffusion_model.blocks.0.self_attn"
    for name, make in (
        ("model", lambda live: ("diffusion_model", swapped_copy(live))),
        ("class", lambda live: ("diffusion_model.__class__", type("Swapped", (type(live),), {}))),
        ("part", lambda live: (f"{attention}.__class__", swapped_class(live.blocks[0].self_attn))),
    ):
        model = wan()
        other = model.clone()
        other.add_object_patch(*make(model.model.diffusion_model))
        run(other)
        patched = sla2(model)
        run(patched)
        results[name] = {
            "facts": families.facts_of(model) is not None,
            "of the other": families.unsupported_reason_of(other),
            "sparse": found(patched)["sparse"],
        }
    return results


def swapped_class(thing):
    return type("Swapped", (type(thing),), {})


def swapped_copy(live):
    copy = object.__new__(swapped_class(live))
    copy.__dict__ = dict(live.__dict__)
    return copy


def contents(model):
    """Every function and every table of hooks that lies in a module's __dict__; the rest is ComfyUI's own bookkeeping."""
    return {
        (name, key): (id(value), len(value) if isinstance(value, dict) else None)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if callable(value) or "_hooks" in key
    }


@case
def nothing_is_left_in_the_model():
    model = wan()
    plain = run(model)
    live = model.model.diffusion_model
    before = contents(live)
    patched = sla2(model)
    run(patched)
    sparse = found(patched)["sparse"]
    patched.detach()
    same = contents(live) == before
    run(patched)
    run(model)  # loads the plain one in place of the patched one
    same = same and contents(live) == before
    attention = live.blocks[0].self_attn
    reached = []

    class Later(type(attention)):
        def forward(self, x, freqs, transformer_options=None):
            reached.append(1)
            return super().forward(x, freqs, transformer_options=transformer_options)

    attention.__class__ = Later
    again = run(model)
    return {
        "sparse": sparse,
        "same": same,
        "left": "forward" in vars(attention),
        "later class": len(reached),
        "plain again": bool(torch.equal(plain, again)),
    }


@case
def nothing_is_left_where_the_self_attention_is_a_method():
    path, arguments, inputs, *_ = FAMILIES["wan animate-2"]
    cls = class_of(path)
    if cls is None:
        return None
    model = build(cls, arguments, comfy.ops.disable_weight_init)
    patcher = comfy.model_patcher.ModelPatcher(Host(model), torch.device("cpu"), torch.device("cpu"))
    patcher.model_options.setdefault("transformer_options", {})
    sample(patcher, inputs_for(cls, inputs))
    before = contents(model)
    patched = sla2(patcher)
    sample(patched, inputs_for(cls, inputs))
    return {"sparse": found(patched)["sparse"], "same": contents(model) == before}


def attempt(function):
    try:
        return function()
    except Exception:  # reported to the test of this case; the others still run
        return {"error": traceback.format_exc()}


chosen = [function for function in CASES if not names or function.__name__ in names]
print(json.dumps({function.__name__: attempt(function) for function in chosen}))
