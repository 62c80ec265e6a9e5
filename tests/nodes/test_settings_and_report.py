"""Settings, layer lists, and the report's words and data."""

import json
from types import SimpleNamespace

import pytest
import torch

HEADS = 2


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("", set()),
        ("0, 1, 28-29", {0, 1, 28, 29}),
        ("-1", {29}),
        (" 3 - 5 ,", {3, 4, 5}),
        ("-2--1", {28, 29}),
        ("0，1、28-29", {0, 1, 28, 29}),
    ],
)
def test_layer_lists(pack_module, text, layers):
    assert pack_module("nodes.settings.values").parse_layers(text, 30) == layers


@pytest.mark.parametrize("text", ["30", "-31", "a", "1-", "5-3", "1;2", "1.5", "0-99"])
def test_wrong_layer_lists_are_one_sentence(pack_module, text):
    with pytest.raises(ValueError, match=r"^dense_layers [^\n]*\.$"):
        pack_module("nodes.settings.values").parse_layers(text, 30)


@pytest.mark.parametrize("text", ["a", "1-", "5-3", "-1--3", "1;2", "1.5"])
def test_layer_lists_of_no_model_are_refused_without_one(pack_module, text):
    with pytest.raises(ValueError, match=r"^dense_layers [^\n]*\.$"):
        pack_module("nodes.settings.values").check_layers(text)


@pytest.mark.parametrize("text", ["", "0-99", "-31", "3--1", "-1-3", "0，1"])
def test_layer_lists_that_some_model_has_are_not(pack_module, text):
    pack_module("nodes.settings.values").check_layers(text)


@pytest.mark.parametrize(
    "wrong",
    [
        {"sparsity": 1.0},
        {"sparsity": float("nan")},
        {"fixed_ratio": 1.1},
        {"start_percent": 0.5, "end_percent": 0.5},
        {"precision": "4bit"},
        {"ratio_mode": "best"},
    ],
)
def test_wrong_settings_are_one_sentence(pack_module, wrong):
    with pytest.raises(ValueError, match=rf"^{next(iter(wrong))} [^\n]*\.$"):
        pack_module("nodes.settings.values").AttentionSettings(**wrong)


@pytest.mark.parametrize(
    ("sparsity", "words"),
    [(0.97, "skips 97%, keeps 3%"), (0, "skips 0%, keeps 100%"), (0.965, "skips 96.5%, keeps 3.5%")],
)
def test_sparsity_is_shown_both_ways(pack_module, sparsity, words):
    assert pack_module("nodes.settings.values").skips_keeps(sparsity) == words


def test_data_is_json_even_where_numbers_are_not_finite(bench, qkv, pack_module):
    report = pack_module("nodes.runs.report_text")
    b = bench(ratio_mode="estimated")
    b.hook.begin_run()
    b.model_call()
    b.attend(*qkv, heads=HEADS)
    qkv[0][0, 5] = float("nan")
    b.attend(*qkv, heads=HEADS)
    b.hook.end_run()
    (run,) = b.hook.runs.finished()
    data = report.report_data(b.hook, run)
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["layers"][0]["ratio_range"] == [None, None]
    assert "ratio not finite to not finite" in report.report_text(b.hook, run)


def test_the_report_knows_which_run_made_a_latent(pack_module):
    record = pack_module("nodes.runs.record")
    latents = [torch.randn(1, 16, 3, 8, 8) for _ in range(2)]
    samples = [record.sample_of(latent) for latent in latents]
    assert record.difference(samples[0], record.sample_of(latents[0].bfloat16())) < 0.02
    assert record.difference(*samples) > 0.1
    assert record.difference(samples[0], record.sample_of(latents[0][..., :4])) == float("inf")
    assert record.sample_of(object()) is None


def test_calls_that_never_reach_us_are_counted_per_layer(bench, pack_module):
    b = bench()
    b.hook.begin_run()
    b.model_call()
    b.run.count_entered(2)
    b.hook.end_run()
    data = pack_module("nodes.runs.report_text").report_data(b.hook, b.hook.runs.finished()[0])
    assert data["dense_calls"] == 1
    assert data["layers"][0]["dense"] == {"another node's attention took the call before SLA2 could see it": 1}


def test_no_markup_reaches_the_page(pack_module):
    assert "<" not in pack_module("nodes.page.text").plain("<img src=x onerror=alert(1)>")


def test_subclasses_of_a_supported_model_are_not_taken_for_it(pack_module):
    families = pack_module("nodes.attention.model_families")
    model = type("VaceWanModel", (), {})()
    assert families.model_facts(model) is None
    assert families.unsupported_model_reason(model) == "model family VaceWanModel is not supported yet"


class Attention(torch.nn.Module):
    """Stands for a self-attention module; answers with the layer that its options name."""

    def forward(self, x, transformer_options=None):
        return (transformer_options or {}).get("sla2_layer")


def marked(pack_module, hook, layer, module):
    marks = pack_module("nodes.attention.model_marks")
    facts = SimpleNamespace(attention_paths=("first",) * layer + ("attn",))
    model = torch.nn.ModuleDict({"first": torch.nn.Identity(), "attn": module})
    patcher = SimpleNamespace(object_patches={}, get_model_object=lambda name: getattr(module, name.split(".")[-1]))
    patcher.add_object_patch = patcher.object_patches.__setitem__
    marks.mark_layers(patcher, hook, facts, model)
    for name, value in patcher.object_patches.items():
        if name.startswith("diffusion_model.attn."):
            assert marks.is_mark(name, value)
            setattr(module, name.split(".")[-1], value)
    return module


@pytest.mark.parametrize("positional", [True, False])
def test_a_mark_says_which_layer_runs_and_keeps_the_hooks_of_others(pack_module, bench, positional):
    b, module, seen = bench(), Attention(), []
    module.register_forward_pre_hook(lambda *call: seen.append(1))
    marked(pack_module, b.hook, 3, module)
    b.model_call()
    assert (module(0, b.options) if positional else module(0, transformer_options=b.options)) == 3
    assert b.run.layers[3].entered == 1 and seen == [1]


class TakesNoOptions(Attention):
    def forward(self, x):
        return x


def test_a_module_that_takes_no_options_is_counted_and_said(pack_module, bench):
    b = bench()
    module = marked(pack_module, b.hook, 2, TakesNoOptions())
    b.hook.begin_run()
    frame = pack_module("nodes.attention.model_frames").Frame(SimpleNamespace(), dict, {"sigmas": torch.tensor([0.5])})
    with b.hook.frames.opened(frame):
        assert module(7) == module(7) == 7
    run = b.run
    b.hook.end_run()
    reason = pack_module("nodes.attention.unreached").WITHOUT_OPTIONS
    assert run.layers[2].dense == {reason: 2} and run.has_hidden_calls
    text = pack_module("nodes.runs.report_text").report_text(b.hook, run)
    assert f"2 dense ({reason})" in text
    assert f"advice: most calls could not run sparse: {reason}" in text


def test_a_module_that_takes_no_options_stops_where_that_is_asked(pack_module, bench):
    b = bench(stop_on_unsupported=True)
    module = marked(pack_module, b.hook, 2, TakesNoOptions())
    frame = pack_module("nodes.attention.model_frames").Frame(SimpleNamespace(), dict, {})
    with b.hook.frames.opened(frame), pytest.raises(RuntimeError, match="layer 2: this self-attention takes no"):
        module(7)


def test_options_that_a_caller_left_out_are_handed_on(pack_module, bench):
    b = bench()
    module = marked(pack_module, b.hook, 1, Attention())
    frame = pack_module("nodes.attention.model_frames").Frame(SimpleNamespace(), dict, {"sigmas": torch.tensor([0.5])})
    with b.hook.frames.opened(frame):
        assert module(0) == 1


def test_the_report_says_which_loop_ran_and_why_not_the_faster_one(bench, qkv, pack_module):
    report, b = pack_module("nodes.runs.report_text"), bench(dense_layers=frozenset([1]))
    b.hook.begin_run()
    b.model_call()
    for layer in (0, 1, 2):
        b.attend(*qkv, heads=HEADS, layer=layer)
    b.hook.end_run()
    (run,) = b.hook.runs.finished()
    (row,) = report.report_data(b.hook, run)["loops"]
    assert row["loop"] == "PyTorch's loop, block by block" and row["calls"] == 2 == run.loops.total()
    assert "the Triton kernels need an NVIDIA GPU" in row["why_not_faster"]
    line = f"2 sparse calls ran in PyTorch's loop, block by block ({row['why_not_faster']})"
    assert line in report.report_text(b.hook, run).splitlines()
