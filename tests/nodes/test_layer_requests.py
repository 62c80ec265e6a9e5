"""Layers that come with an attention of their own: FastH3's gate for VSA, and a checkpoint's wish for comfy_kitchen_sol."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

HEADS = 2
SOL = {"attention": "comfy_kitchen_sol", "tau": 1.3}


class Attention(torch.nn.Module):
    """ComfyUI 0.38's self-attention, as far as it says how it wants to be computed."""

    def __init__(self, gate=None, config=None, function=None):
        super().__init__()
        self.to_gate_compress = gate
        self.comfy_attention = torch.nn.Module()
        self.comfy_attention.config, self.comfy_attention.function = config, function


def model_of(*modules):
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList(modules)
    return model


@pytest.fixture
def bench_of(bench):
    """bench_of(attention modules, ...): a bench in a model call of a model with these layers."""

    def make(*modules, **settings):
        b = bench(**settings)
        paths = tuple(f"blocks.{i}" for i in range(len(modules)))
        b.hook.facts = replace(b.hook.facts, num_layers=len(modules), attention_paths=paths)
        b.options = {"sigmas": torch.tensor([0.5]), b.hook_module.OVERRIDE: b.override}
        b.hook.model_call(model_of(*modules), dict, b.options)
        return b

    return make


def gate():
    return torch.nn.Linear(8, 8, bias=False)


def test_a_layer_that_was_trained_for_vsa_runs_dense_and_says_so(bench_of, qkv, pack_module):
    b = bench_of(Attention(gate()), Attention())
    reason = pack_module("nodes.attention.layer_requests").TRAINED_FOR_VSA
    assert torch.equal(b.attend(*qkv, heads=HEADS, layer=0), b.attention(*qkv, heads=HEADS))
    b.attend(*qkv, heads=HEADS, layer=1)
    assert b.run.layers[0].dense == {reason: 1} and not b.run.layers[0].sparse
    assert b.run.layers[1].sparse == 1
    assert "VSA" in reason and "to_gate_compress" in reason


def test_a_layer_that_was_trained_for_vsa_stops_where_that_is_asked(bench_of, qkv, pack_module):
    b = bench_of(Attention(gate()), stop_on_unsupported=True)
    with pytest.raises(pack_module("nodes.attention.run_dense").UnsupportedCall, match="trained for VSA"):
        b.attend(*qkv, heads=HEADS)


def test_settings_that_keep_the_layer_dense_are_the_reason_and_stop_nothing(bench_of, qkv):
    b = bench_of(Attention(gate()), stop_on_unsupported=True, dense_layers=frozenset({0}))
    b.attend(*qkv, heads=HEADS)
    assert b.run.layers[0].dense == {"dense_layers keeps this layer dense": 1}


@pytest.mark.parametrize(
    "config", [SOL, [SOL], [{"attention": "comfy_kitchen_int8"}, SOL]], ids=["one", "list", "second"]
)
def test_sla2_takes_the_layers_that_ask_for_sol_and_says_so(bench_of, qkv, config):
    b = bench_of(
        Attention(config=config), Attention(config=[{"attention": "comfy_kitchen_int8"}]), Attention(config=config)
    )
    b.attend(*qkv, heads=HEADS, layer=0)
    assert b.run.layers[0].sparse == 1
    (note,) = (note for note in b.run.notes if "comfy_kitchen_sol" in note)
    assert "layers 0, 2 " in note


@pytest.mark.parametrize("config", [None, [], "comfy_kitchen_sol", [None], {"attention": None}, object()])
def test_other_configs_ask_for_nothing(bench_of, config):
    assert not bench_of(Attention(config=config)).run.notes


def test_dense_calls_of_a_layer_that_asks_for_sol_are_dense(bench_of, pack_module):
    """What the report counts as dense must not be computed by another sparse attention."""

    def sol(*args, **kwargs):
        raise AssertionError("not a dense attention")

    def int8(*args, **kwargs):
        return args[0]

    preferred = pack_module("nodes.compat.own_attention").PREFERRED
    layers = (
        Attention(config=[SOL], function=sol),
        Attention(config=[{"attention": "comfy_kitchen_int8"}], function=int8),
    )
    b, given = bench_of(*layers), []
    for layer, module in enumerate(layers):

        def forward(x, transformer_options=None):
            pass

        _, kwargs = b.hook.enter_layer(layer, module, forward, (None,), {"transformer_options": b.options})
        given.append(kwargs["transformer_options"].get(preferred))
    assert given == [None, int8]


def test_a_request_that_a_lora_sets_for_some_runs_is_noticed_in_them(bench_of, qkv):
    """ComfyUI puts object patches in place before a run and takes them out after it."""
    module = Attention()
    b = bench_of(module)
    model = b.options[b.hook_module.CALL].diffusion_model
    for config in (None, [SOL], None):
        module.comfy_attention.config = config
        b.hook.begin_run()
        b.hook.model_call(model, dict, b.options)
        b.hook.end_run()
    asked = [any("comfy_kitchen_sol" in note for note in run.notes) for run in b.hook.runs.finished()[-3:]]
    assert asked == [False, True, False]


def test_nodes_are_told_before_they_run_a_model_that_was_trained_for_vsa(bench_of, pack_module):
    requests = pack_module("nodes.attention.layer_requests")
    for modules, reason in (((Attention(), Attention(gate())), requests.TRAINED_FOR_VSA), ((Attention(),), None)):
        b = bench_of(*modules)
        model = SimpleNamespace(diffusion_model=b.options[b.hook_module.CALL].diffusion_model)
        patcher = SimpleNamespace(model=model, object_patches={}, object_patches_backup={})
        assert requests.trained_for_vsa_reason(patcher, b.hook.facts) == reason
        assert requests.trained_for_vsa_reason(patcher, None) is None


def test_another_model_that_is_called_with_our_options_has_no_requests(bench_of):
    b = bench_of(Attention(gate()))
    b.hook.begin_run()
    b.hook.model_call(torch.nn.Linear(1, 1), dict, b.options)
    assert b.options[b.hook_module.CALL].requests == type(b.options[b.hook_module.CALL].requests)()
