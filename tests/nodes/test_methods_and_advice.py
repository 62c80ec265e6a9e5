"""SLA v1 weights, top-k only, and what the report advises."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from sla2_kernels.sla_v1 import SLAWeights, sla_attention

HEADS, DIM, LAYERS = 2, 64, 4


@pytest.fixture
def sla_weights():
    generator = torch.Generator().manual_seed(3)
    layers = [
        (torch.randn(DIM, DIM, generator=generator) / 8, torch.randn(DIM, generator=generator)) for _ in range(LAYERS)
    ]
    return SLAWeights(tuple(layers), "turbo.pth")


def test_the_hook_runs_sla_with_the_weights_of_the_layer(bench, qkv, sla_weights):
    b = bench(sla_weights=sla_weights)
    b.model_call()
    heads = [t.unflatten(-1, (HEADS, DIM)) for t in qkv]
    for layer in (0, 3):
        out = b.attend(*qkv, heads=HEADS, layer=layer)
        expected = sla_attention(*heads, sla_weights.layers[layer], sparsity=0.5, precision="16bit", layout="BNHD")
        torch.testing.assert_close(out, expected.flatten(2))


def test_top_k_only_has_no_linear_branch(bench, qkv):
    b = bench(method="top-k only")
    b.hook.begin_run()
    b.model_call()
    heads = [t.unflatten(-1, (HEADS, DIM)) for t in qkv]
    expected = sla_attention(*heads, None, sparsity=0.5, precision="16bit", layout="BNHD").flatten(2)
    torch.testing.assert_close(b.attend(*qkv, heads=HEADS), expected)
    b.hook.end_run()
    assert b.hook.runs.finished()[0].layers[0].ratio_range == (1.0, 1.0)


@pytest.mark.parametrize("method", ["sla2", "top-k only", "automatic"])
def test_the_break_even_search_times_what_the_model_runs(bench, qkv, pack_module, sla_weights, method):
    weights = sla_weights if method == "automatic" else None
    b = bench(method=method, sla_weights=weights, ratio_mode="fixed", fixed_ratio=0.7)
    b.model_call()
    attend = pack_module("nodes.comparison.break_even").attend_as(b.hook, torch.device("cpu"), "16bit")
    found = attend(*(t.unflatten(-1, (HEADS, DIM)) for t in qkv))
    torch.testing.assert_close(found.flatten(2), b.attend(*qkv, heads=HEADS))


def test_the_report_names_the_method(bench, qkv, sla_weights, pack_module):
    text = pack_module("nodes.runs.report_text")
    assert text.method_name(bench().hook) == "SLA2"
    assert text.method_name(bench(method="top-k only").hook) == "top-k only"
    hook = bench(sla_weights=sla_weights).hook
    assert text.method_name(hook) == "SLA version 1, weights of turbo.pth" and text.ratio_name(hook) == "none"


def test_an_unknown_method_is_refused(bench):
    with pytest.raises(ValueError, match="method must be one of automatic, sla2, top-k only, got 'dense'"):
        bench(method="dense")


@pytest.mark.parametrize(
    ("layers", "head_dim", "method", "sentence"),
    [
        (3, DIM, "automatic", "have 3 layers of head_dim 64, and this model has 4 of head_dim 64"),
        (LAYERS, 32, "automatic", "of head_dim 32"),
        (LAYERS, DIM, "sla2", "sla_weights are connected, and method is sla2"),
    ],
)
def test_weights_of_another_model_are_refused(pack_module, monkeypatch, layers, head_dim, method, sentence):
    checks = pack_module("nodes.attention.weight_checks")
    weights = SLAWeights(((torch.zeros(head_dim, head_dim), torch.zeros(head_dim)),) * layers)
    facts = SimpleNamespace(num_layers=LAYERS, head_dim=DIM)
    with pytest.raises(ValueError, match=sentence):
        checks.check_sla_weights(weights, facts, method)


def finished(seconds=10.0, shortest=8400, **records):
    """A closed run: layers given as {"sparse", "dense", "ms", "entered"}."""
    layers = {}
    for number, record in enumerate(records.values()):
        sparse, dense = record.get("sparse", 0), Counter(record.get("dense", {}))
        unreached = max(0, record.get("entered", 0) - sparse - dense.total())
        layers[number] = SimpleNamespace(
            sparse=sparse, dense=dense, milliseconds=record.get("ms", {}), unreached=unreached
        )
    counts = {"ragged_sage_calls": Counter(), "sparse_calls": sum(layer.sparse for layer in layers.values())}
    return SimpleNamespace(layers=layers, started=0.0, ended=seconds, precisions={"int8"}, shortest=shortest, **counts)


TRAINED = SimpleNamespace(
    router=object(), sla_weights=None, settings=SimpleNamespace(sparsities=(0.97,), method="automatic")
)
UNTRAINED = SimpleNamespace(
    router=None, sla_weights=None, settings=SimpleNamespace(sparsities=(0.97,), method="automatic")
)
CAREFUL = SimpleNamespace(
    router=None, sla_weights=None, settings=SimpleNamespace(sparsities=(0.9,), method="automatic")
)
SHORT = {"the sequence has 768 tokens, minimum_tokens is 8192": 9}
ADVICE = {
    "nothing to say": (TRAINED, finished(a={"sparse": 1000, "ms": {"sparse": 5.0}}), []),
    "too short": (TRAINED, finished(a={"dense": SHORT}), ["SLA2 does not pay here: the sequence has 768 tokens"]),
    "not faster": (
        TRAINED,
        finished(a={"sparse": 500, "dense": {"dense_layers keeps this layer dense": 500}, "ms": {"sparse": 5.0, "dense": 5.2}}),
        ["a sparse call took 5.00 ms and a dense one 5.20 ms"],
    ),
    "small share": (
        TRAINED, finished(a={"sparse": 100, "ms": {"sparse": 5.0}}), ["self-attention took 5% of the sampling time"],
    ),
    "masks": (TRAINED, finished(a={"dense": {"the call has an attention mask": 4}}), ["most calls could not run sparse: the call has"]),
    "another node": (TRAINED, finished(a={"entered": 9}), ["most calls went to another node's attention"]),
    "untrained": (
        UNTRAINED, finished(a={"sparse": 9}),
        ["sparsity 0.97 without a trained router costs quality at 8,400 tokens: stay at or below 0.7, or"],
    ),
    "untrained, longer": (UNTRAINED, finished(shortest=14_080, a={"sparse": 9}), ["sparsity 0.97 without a trained router costs quality at 14,080 tokens: stay at or below 0.8, or"]),
    "untrained, long enough": (CAREFUL, finished(shortest=32_760, a={"sparse": 9}), []),
}  # fmt: skip


@pytest.mark.parametrize(
    ("bit_width", "fastest", "advised"),
    [("16bit", "int8", True), ("16bit", "16bit", False), ("auto", "16bit", False), ("auto", "int8", False)],
)
def test_a_faster_bit_width_is_advised_only_where_there_is_one(pack_module, monkeypatch, bit_width, fastest, advised):
    """On a CPU, and on a card that no low-bit kernel fits, auto itself is 16bit."""
    module = pack_module("nodes.runs.advice")
    monkeypatch.setattr(module, "default_precision", lambda device: fastest)
    settings = SimpleNamespace(sparsities=(0.9,), method="automatic", precision=bit_width)
    hook = SimpleNamespace(router=object(), sla_weights=None, settings=settings)
    run = finished(a={"sparse": 1000, "ms": {"sparse": 5.0}})
    run.precisions, run.devices = {"16bit"}, {torch.device("cpu")}
    found = module.advice(hook, run)
    assert found == (["bit_width is set to 16bit: auto would take int8 on this device"] if advised else [])


def test_a_run_on_a_cpu_is_not_told_to_use_what_it_used(bench, qkv, pack_module):
    for bit_width in ("auto", "16bit"):
        b = bench(precision=bit_width)
        b.hook.begin_run()
        b.model_call()
        b.attend(*qkv, heads=HEADS)
        b.hook.end_run()
        (run,) = b.hook.runs.finished()
        assert run.precisions == {"16bit"}
        assert "16bit" not in " ".join(pack_module("nodes.runs.advice").advice(b.hook, run))


@pytest.mark.parametrize(("hook", "run", "expected"), ADVICE.values(), ids=ADVICE)
def test_advice(pack_module, hook, run, expected):
    found = pack_module("nodes.runs.advice").advice(hook, run)
    assert len(found) == len(expected)
    assert all(sentence.startswith(start) for sentence, start in zip(found, expected, strict=True))
