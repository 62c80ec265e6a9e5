"""The words of the resolved attention stack, on a stand-in for ComfyUI's ModelPatcher."""

import functools
import sys
from collections import Counter
from types import ModuleType, SimpleNamespace

import pytest
import torch

OVERRIDE = "optimized_attention_override"


def patcher(override=None, options=(), transformer_options=(), **parts):
    transformer_options = dict(transformer_options) | ({OVERRIDE: override} if override else {})
    parts = dict.fromkeys(("patches", "injections", "object_patches", "wrappers", "callbacks"), {}) | parts
    return SimpleNamespace(model_options={"transformer_options": transformer_options, **dict(options)}, **parts)


@pytest.fixture
def stack(pack_module):
    return pack_module("nodes.attention.neighbours").attention_stack


def foreign(func, *args, **kwargs):
    return func(*args, **kwargs)


FOREIGN = f"{__name__}.foreign"


def test_the_backend_is_the_one_that_the_calls_came_from(stack, bench, qkv):
    b = bench()
    b.hook.begin_run()
    b.model_call()
    run = b.run
    b.attend(*qkv, heads=2)
    b.hook.end_run()
    found = stack(patcher(b.override), b.hook, run)
    assert found == {"attention": f"SLA2; its dense calls run in {run.backends.copy().pop()}", "also": []}
    assert found["attention"].endswith("conftest.dense_attention")


def test_without_calls_it_is_comfyuis_default(stack, bench, monkeypatch):
    attention = ModuleType("attention")
    attention.optimized_attention = lambda: None
    attention.optimized_attention.__module__ = "comfy.ldm.modules.attention"
    attention.optimized_attention.__qualname__ = "attention_sub_quad"
    monkeypatch.setitem(sys.modules, "comfy", ModuleType("comfy"))
    monkeypatch.setitem(sys.modules, "comfy.ldm", ModuleType("comfy.ldm"))
    modules = ModuleType("comfy.ldm.modules")
    modules.attention = attention
    monkeypatch.setitem(sys.modules, "comfy.ldm.modules", modules)
    b = bench()
    assert stack(patcher(b.override), b.hook)["attention"].endswith("run in ComfyUI's sub-quadratic attention")
    assert stack(patcher())["attention"] == "ComfyUI's sub-quadratic attention"
    attention.optimized_attention.__qualname__ = "attention_of_tomorrow"
    assert stack(patcher())["attention"] == "comfy.ldm.modules.attention.attention_of_tomorrow"


def test_other_overrides_are_named_by_module_and_function(stack, bench):
    b = bench()
    ours = b.override_over(foreign)
    assert stack(patcher(ours), b.hook)["attention"] == f"SLA2; its dense calls run in {FOREIGN}"
    assert stack(patcher(functools.partial(foreign, 1)), b.hook)["attention"].endswith(f"run in {FOREIGN}")
    holding = functools.partial(foreign, ours)
    assert stack(patcher(holding), b.hook)["attention"].startswith(f"{FOREIGN}, which holds SLA2; its dense")
    assert stack(patcher(foreign))["attention"] == FOREIGN


def comfyuis_override(optimized_attention=None, renamed=None):
    """As ComfyUI's ModelPatcher makes one for a backend node: of its name, over the function chosen."""

    def override(_, *args, **kwargs):
        return (renamed or optimized_attention)(*args, **kwargs)

    override.__module__ = "comfy.model_patcher"
    override.__qualname__ = "ModelPatcher.set_model_optimized_attention.<locals>.optimized_attention_override"
    return override


def test_a_backend_that_a_node_chose_is_named(stack):
    def chosen(*args):
        pass

    chosen.__module__, chosen.__qualname__ = "comfy.ldm.modules.attention", "attention_sage"
    assert stack(patcher(comfyuis_override(chosen)))["attention"] == "SageAttention, which a node chose for this model"
    unknown = stack(patcher(comfyuis_override(renamed=chosen)))["attention"]
    assert unknown.endswith("set_model_optimized_attention.optimized_attention_override")


def test_a_packs_module_is_named_without_the_path_of_its_folder(pack_module):
    name_of = pack_module("nodes.compat.override_chain").name_of

    def override():
        pass

    for module in ("/home/me/ComfyUI/custom_nodes/Some_x_Pack.nodes.patch", "C:\\ComfyUI\\Some_x_Pack.nodes.patch"):
        override.__module__ = module
        assert name_of(override).startswith("Some.Pack.nodes.patch.test_a_packs_module")


def test_everything_else_on_the_model(stack, bench):
    b = bench()
    lora, other = SimpleNamespace(name="lora"), Counter()
    compiled = torch.compile(torch.nn.Linear(2, 2), backend="eager")
    model = patcher(
        b.override_over(foreign),
        {"context_handler": object(), "model_function_wrapper": foreign},
        {
            "patches": {"attn1_patch": [foreign], "attn2_patch": [foreign]},
            "patches_replace": {"dit": {("double_block", 0): foreign, ("double_block", 1): foreign}},
        },
        patches={
            "a": [(1.0, lora, 1.0, None, None), (0.5, lora, 1.0, None, None)],
            "b": [(1.0, lora, 1.0, None, None), (1.0, ("diff", (1,)), 1.0, None, None)],
            "c": [(1.0, other, 1.0, None, None)],
            "d": [(0.5, [(torch.ones(1), None), (1.0, lora, 1.0, None, None)], 0.5, None, None)],
        },
        injections={"bypass_lora": [], "else": []},
        object_patches={
            "model_sampling": object(),
            "diffusion_model.blocks.0.self_attn._forward_pre_hooks": {"sla2_mark": foreign},
            "diffusion_model.blocks.0.self_attn._forward_pre_hooks_with_kwargs": {"sla2_mark": True},
            "diffusion_model.blocks.1.self_attn.forward": foreign,
            "diffusion_model.blocks.2": compiled,
            "diffusion_model.blocks.3": compiled,
        },
        wrappers={
            "outer_sample": {"sla2": [foreign], "easycache": [foreign], "ContextWindows_sampler_sample": [foreign]},
            "apply_model": {"torch.compile": [foreign]},
            "diffusion_model": {None: [foreign], "easycache": [foreign]},
        },
    )
    also = stack(model, b.hook)["also"]
    assert sorted(also) == sorted(
        [
            "LoRA on 2 weights", "the weight patch diff on 1 weight", "collections.Counter on 1 weight",
            "a merged model on 1 weight",
            "LoRA in bypass mode", "the injection else", f"{FOREIGN} on 1 part of the model",
            "torch.compile on 2 parts of the model", "EasyCache", "context windows", "torch.compile", FOREIGN,
            f"{FOREIGN} as attn1_patch", f"{FOREIGN} as attn2_patch", f"{FOREIGN} in place of 2 dit blocks",
        ]
    )  # fmt: skip
