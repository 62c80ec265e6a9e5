"""Settings, layer lists, and the report's words and data."""

import json
from types import SimpleNamespace

import pytest
import torch

HEADS = 2


@pytest.mark.parametrize(
    ("text", "layers"),
    [("", set()), ("0, 1, 28-29", {0, 1, 28, 29}), ("-1", {29}), (" 3 - 5 ,", {3, 4, 5}), ("-2--1", {28, 29})],
)
def test_layer_lists(pack_module, text, layers):
    assert pack_module("nodes.settings").parse_layers(text, 30) == layers


@pytest.mark.parametrize("text", ["30", "-31", "a", "1-", "5-3", "1;2", "1.5", "0-99"])
def test_wrong_layer_lists_are_one_sentence(pack_module, text):
    with pytest.raises(ValueError, match=r"^dense_layers [^\n]*\.$"):
        pack_module("nodes.settings").parse_layers(text, 30)


@pytest.mark.parametrize(
    "wrong",
    [{"sparsity": 1.0}, {"sparsity": float("nan")}, {"fixed_ratio": 1.1}, {"start_percent": 0.5, "end_percent": 0.5},
     {"bit_width": "4bit"}, {"ratio_mode": "best"}],
)  # fmt: skip
def test_wrong_settings_are_one_sentence(pack_module, wrong):
    with pytest.raises(ValueError, match=rf"^{next(iter(wrong))} [^\n]*\.$"):
        pack_module("nodes.settings").AttentionSettings(**wrong)


@pytest.mark.parametrize(
    ("sparsity", "words"),
    [(0.97, "skips 97%, keeps 3%"), (0, "skips 0%, keeps 100%"), (0.965, "skips 96.5%, keeps 3.5%")],
)
def test_sparsity_is_shown_both_ways(pack_module, sparsity, words):
    assert pack_module("nodes.settings").skips_keeps(sparsity) == words


def test_data_is_json_even_where_numbers_are_not_finite(bench, qkv, pack_module):
    report = pack_module("nodes.report_text")
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
    record = pack_module("nodes.run_record")
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
    data = pack_module("nodes.report_text").report_data(b.hook, b.hook.runs.finished()[0])
    assert data["dense_calls"] == 1
    assert data["layers"][0]["dense"] == {"another node's attention took the call before SLA2 could see it": 1}


def test_no_markup_reaches_the_page(pack_module):
    assert "<" not in pack_module("nodes.progress_text").plain("<img src=x onerror=alert(1)>")


def test_subclasses_of_a_supported_model_are_not_taken_for_it(pack_module):
    layouts = pack_module("nodes.model_layouts")
    model = type("VaceWanModel", (), {})()
    assert layouts.model_facts(model) is None
    assert layouts.unsupported_model_reason(model) == "model family VaceWanModel is not supported yet"


def test_a_marked_module_is_looked_up_in_the_model_of_the_call(pack_module):
    hook = pack_module("nodes.patching")

    class Module:
        def __init__(self, name):
            self.name = name

        def forward(self, x, transformer_options):
            return self.name, transformer_options.get(hook.LAYER)

    def model(name):
        return SimpleNamespace(blocks=[], only=SimpleNamespace(self_attn=Module(name)))

    first, copied = model("first"), model("copied")
    forward = hook.marked_forward(3, "only.self_attn", first.only.self_attn, None)
    call = SimpleNamespace(
        diffusion_model=copied,
        counts={"entered": 0},
        run=SimpleNamespace(count_entered=lambda n: None),
        repeated=False,
    )
    assert forward(0, transformer_options={hook.CALL: call}) == ("copied", 3)
    assert forward(0, transformer_options={}) == ("first", None)


def test_a_module_that_is_called_without_options_is_counted_and_said(pack_module, bench):
    patching, b = pack_module("nodes.patching"), bench()

    class Module:
        def forward(self, x, transformer_options=None):
            return x

    b.hook.begin_run()
    forward = patching.marked_forward(2, "blocks.2.self_attn", Module(), None, hook=b.hook)
    assert forward(7) == forward(7, transformer_options={}) == 7
    run = b.run
    b.hook.end_run()
    assert run.layers[2].dense == {patching.WITHOUT_OPTIONS: 2} and run.has_hidden_calls
    text = pack_module("nodes.report_text").report_text(b.hook, run)
    assert "2 dense (the model passes no options here" in text
    assert "advice: most calls could not run sparse: the model passes no options here" in text


def test_the_report_says_which_loop_ran_and_why_not_the_faster_one(bench, qkv, pack_module):
    report, b = pack_module("nodes.report_text"), bench(dense_layers=frozenset([1]))
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
