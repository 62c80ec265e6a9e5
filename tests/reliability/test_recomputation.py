"""Training with gradient checkpointing through SLA2: recomputed calls go the way they went before, and count once."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

HEADS, LAYERS = 2, 3
DEPTHS = ["model", "blocks"]  # what is recomputed: the model as one, or block by block


@pytest.fixture
def failure(pack_module):
    return pack_module("nodes.attention.failures")


class Training:
    """One optimisation step of a small model on a bench: every layer's attention with q from the layer before."""

    def __init__(self, b, qkv, recomputed, new_frame):
        self.b, self.recomputed, self.new_frame = b, recomputed, new_frame
        self.q, self.k, self.v = (tensor.clone().requires_grad_(True) for tensor in qkv)
        # as core's trainer hands it over
        sigmas = torch.tensor([0.5], requires_grad=True)
        self.options = {"sigmas": sigmas, "optimized_attention_override": b.override}
        self.options["sample_sigmas"] = torch.tensor([1.0, 0.5, 0.0])

    def model(self, x):
        frame = self.new_frame(SimpleNamespace(), dict, self.options)
        with self.b.hook.frames.opened(frame):
            self.b.hook.open_call(frame)
            self.b.options = self.options
            for layer in range(LAYERS):
                x = self.again(self.block, x, layer) if self.recomputed == "blocks" else self.block(x, layer)
            self.b.hook.finish(frame)
        return x

    def block(self, x, layer):
        call = self.options["sla2_call"]
        call.counts["entered"] += not call.repeated  # as the layer's mark does
        return x + self.b.attend(x * (1 + layer), self.k, self.v, heads=HEADS, layer=layer)

    @staticmethod
    def again(function, *args):
        return checkpoint(function, *args, use_reentrant=False)

    def forward(self):
        out = self.again(self.model, self.q) if self.recomputed == "model" else self.model(self.q)
        return out.square().mean()

    def gradients(self):
        self.forward().backward()
        return [tensor.grad for tensor in (self.q, self.k, self.v)]


@pytest.fixture
def training(bench, qkv, pack_module, monkeypatch):
    """training(recomputed, **settings) in a run that maps are wanted of."""
    monkeypatch.setattr(
        pack_module("nodes.runs.record"), "wanted_maps", pack_module("nodes.runs.routing_maps").RoutingMaps
    )

    def begin(recomputed, tensors=qkv, **settings):
        b = bench(**{"start_percent": 0.1} | settings)
        b.hook.begin_run()
        return Training(b, tensors, recomputed, pack_module("nodes.attention.model_frames").Frame)

    return begin


def outcome(training):
    """Calls of a run by kind, and how many model calls there were."""
    run = training.b.run
    dense = {layer: dict(record.dense) for layer, record in run.layers.items() if record.dense}
    return run.model_calls, [run.layers[layer].sparse for layer in range(LAYERS)], dense


def failing(monkeypatch, pack_module, *numbers):
    """Lets these attempts of the operator fail, counted from 1."""
    way = pack_module("nodes.attention.self_attention")
    real, attempts = way.sparse_request, []

    def sparse_request(*args, **kwargs):
        attempts.append(1)
        if len(attempts) in numbers:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(way, "sparse_request", sparse_request)
    return attempts


@pytest.mark.parametrize("settings", [{}, {"start_percent": 0.0, "end_percent": 1.0, "dense_layers": frozenset({1})}])
@pytest.mark.parametrize("recomputed", DEPTHS)
def test_gradients_and_counts_are_those_without_checkpointing(training, recomputed, settings):
    plain, checked = training(None, **settings), training(recomputed, **settings)
    for wanted, found in zip(plain.gradients(), checked.gradients(), strict=True):
        assert torch.equal(wanted, found)
    assert outcome(checked) == outcome(plain) and outcome(plain)[0] == 1
    assert checked.b.run.maps.shares.keys() == plain.b.run.maps.shares.keys() != set()


@pytest.mark.parametrize("recomputed", DEPTHS)
def test_no_memory_in_the_first_pass_is_repeated_in_the_second(training, recomputed, failure, monkeypatch, pack_module):
    failing(monkeypatch, pack_module, 2)
    checked = training(recomputed)
    gradients = checked.gradients()
    assert outcome(checked) == (1, [1, 0, 0], {layer: {failure.OUT_OF_MEMORY: 1} for layer in (1, 2)})
    plain = training(None, dense_layers=frozenset({1, 2}))
    for wanted, found in zip(plain.gradients(), gradients, strict=True):
        assert torch.equal(wanted, found)


@pytest.mark.parametrize("recomputed", DEPTHS)
def test_no_memory_in_the_second_pass_alone_is_raised_as_it_came(training, recomputed, monkeypatch, pack_module):
    attempts = failing(monkeypatch, pack_module, LAYERS + 1)
    checked = training(recomputed)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        checked.gradients()
    assert len(attempts) == LAYERS + 1
    assert outcome(checked) == (1, [1] * LAYERS, {})


@pytest.mark.parametrize("recomputed", DEPTHS)
def test_a_layer_whose_first_output_was_not_finite_trains_dense(training, recomputed, failure, qkv):
    bad = [tensor.clone() for tensor in qkv]
    bad[2][0, 7, 3] = float("nan")
    checked = training(recomputed, bad)
    checked.gradients()
    assert outcome(checked) == (1, [0] * LAYERS, {layer: {failure.NOT_FINITE: 1} for layer in range(LAYERS)})


def test_a_new_call_of_the_model_inside_a_backward_pass_counts(training):
    """As guidance by a gradient makes them: what is no recomputation is a call like any other."""
    inner = training(None)

    class Guided(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            inner.forward()
            return gradient

    Guided.apply(torch.ones(3, requires_grad=True)).sum().backward()
    assert outcome(inner) == (1, [1] * LAYERS, {})
