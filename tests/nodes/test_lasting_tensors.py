"""Tensors that a run keeps: made before the model call, on every device that calls run on, or outside core's recording."""

import contextlib
import sys
from types import ModuleType

import pytest
import torch


@pytest.fixture
def pauses(monkeypatch):
    """How often core's recording is paused, by a stand-in for its module."""
    module, found = ModuleType("comfy.model_prefetch"), []

    @contextlib.contextmanager
    def pause_malloc_graph():
        found.append("paused")
        yield
        found.append("on")

    module.pause_malloc_graph = pause_malloc_graph
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return found


@pytest.fixture
def router(pack_module):
    weights = pack_module("sla2_kernels.weights")
    layer = weights.RouterLayer(torch.eye(64), torch.eye(64), torch.zeros(1, 2, 1))
    return weights.RouterWeights((layer,) * 4, "wan", 2, 64, sparsities=(0.5,))


def test_a_call_that_was_not_announced_takes_its_memory_outside_the_recording(bench, qkv, router, pauses):
    b = bench(router=router)
    b.hook.begin_run()
    b.model_call()
    b.attend(*qkv, heads=2)
    assert pauses and pauses == ["paused", "on"] * (len(pauses) // 2)
    before = len(pauses)
    b.attend(*qkv, heads=2)
    assert len(pauses) == before


@pytest.mark.parametrize("schedule", ["", "0%-100%: 0.5 -> 0.6; layers 2: dense"])
def test_a_call_that_was_announced_takes_none(bench, qkv, router, pauses, pack_module, schedule):
    rules = pack_module("nodes.settings.schedule").parse_schedule(
        schedule, 4, pack_module("nodes.settings.values").parse_layers
    )
    b = bench(router=router, schedule=rules)
    b.hook.begin_run()
    for sigma in (1.0, 0.5):
        options = {"sigmas": torch.tensor([sigma])}
        b.hook.before_model(torch.device("cpu"), options)
        pauses.clear()
        b.model_call(sigma)
        for layer in range(4):
            b.attend(*qkv, heads=2, layer=layer)
        assert not pauses


def test_what_one_block_learns_of_a_text_mask_for_the_next_is_outside_the_recording(bench, qkv, pauses):
    b = bench(grid=(2, 10, 10), front=100)
    mask = torch.ones(1, 1, 300, dtype=torch.bool)
    mask[..., 40:100] = False
    b.hook.begin_run()
    b.hook.before_model(torch.device("cpu"), {"sigmas": torch.tensor([0.5])})
    pauses.clear()
    b.model_call()
    for layer in range(2):
        b.attend(*qkv, heads=2, mask=mask, layer=layer)
        assert pauses == ["paused", "on"] and b.run.layers[layer].sparse == 1


def test_each_device_gets_its_own(bench, router):
    """As with MultiGPU, where calls of one run are made on several: "meta" stands in for the second one."""
    hook = bench(router=router).hook
    hook.begin_run()
    devices = [torch.device("cpu"), torch.device("meta")]
    for device in devices:
        hook.before_model(device, {"sigmas": torch.tensor([0.5])})
    placed = [hook.weights.on_device(0, device, 0.5) for device in devices]
    assert [weights.proj_q.device for weights in placed] == [weights.ratio.device for weights in placed] == devices
    hook.end_run("stopped before its end")
    assert not hook.weights._placed and not hook.weights._calls
