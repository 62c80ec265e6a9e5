"""A device index other than 0: what asks torch for "the current device" is asked inside, or told, the tensors' own."""

import contextlib
import importlib.util
from types import SimpleNamespace

import pytest
import torch

from benchmarks import measure
from sla2_kernels.support import on_device

CPU, FIRST, SECOND = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)


class Cards:
    """Two GPUs, of which cuda:0 is current: torch's functions of that name, and which device each was asked about."""

    def __init__(self):
        self.current, self.asked = 0, []
        self.capturing = set()

    @contextlib.contextmanager
    def device(self, device):
        before, self.current = self.current, torch.device(device).index
        try:
            yield
        finally:
            self.current = before

    def set_device(self, device):
        self.current = torch.device(device).index

    def current_device(self):
        return self.current

    def index(self, device):
        """As torch does: None, or a name without a number, is the current one."""
        index = None if device is None else torch.device(device).index
        return self.current if index is None else index

    def noting(self, name, result=0):
        def function(device=None):
            self.asked.append((name, self.index(device)))
            return result

        return function

    def is_current_stream_capturing(self):
        return self.current in self.capturing


@pytest.fixture
def cards(monkeypatch):
    cards = Cards()
    for name in ("device", "set_device", "current_device", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, getattr(cards, name))
    for name in ("synchronize", "reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, cards.noting(name))
    return cards


def test_on_device_makes_a_gpu_current_and_leaves_the_former_one(cards):
    with on_device(SECOND):
        assert cards.current == 1
        with on_device(SECOND), on_device(FIRST):
            assert cards.current == 0
        assert cards.current == 1
    assert cards.current == 0
    for device in (FIRST, CPU):
        with on_device(device):
            assert cards.current == 0


@pytest.mark.parametrize("failure", [None, RuntimeError])
def test_the_former_device_is_current_after_a_failure_too(cards, failure):
    with pytest.raises(failure) if failure else contextlib.nullcontext():
        with on_device(SECOND):
            if failure:
                raise failure
    assert cards.current == 0


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_routing_launches_on_the_tensors_device(cards, monkeypatch):
    from sla2_kernels import triton_backend

    launched = []
    monkeypatch.setattr(triton_backend, "_new_selection", lambda q, query_block, count: torch.zeros(2, 3, count))
    monkeypatch.setattr(triton_backend, "_route", lambda *args, **options: launched.append(cards.current))
    q = SimpleNamespace(device=SECOND, dtype=torch.bfloat16, shape=(1, 2, 300, 64))
    assert triton_backend.route(q, q, None, None, 4).shape == (1, 2, 3, 4)
    assert launched == [1] and cards.current == 0


def test_a_graph_is_looked_for_on_the_tensors_device(cards, pack_module):
    capturing = pack_module("nodes.runs.record").capturing
    cards.capturing = {1}
    assert capturing(SECOND) and not capturing(FIRST) and not capturing(CPU)
    assert cards.current == 0


def test_the_break_even_search_times_and_launches_on_the_models_device(cards, pack_module):
    """Dense attention may be another pack's, whose kernels start on the current device."""
    launched = []

    def call(tokens):
        return lambda: launched.append(cards.current)

    rows = pack_module("nodes.comparison.break_even").time_lengths(call, call, SECOND, seconds=0)
    assert len(rows) == 1 and set(launched) == {1}
    assert set(cards.asked) == {("synchronize", 1)} and cards.current == 0


def test_the_step_clock_waits_for_the_models_device(cards, pack_module):
    pack_module("nodes.comparison.runs").StepClock(SECOND, lambda: None)()
    assert cards.asked == [("synchronize", 1)]


def test_peak_memory_is_that_of_the_named_device(cards):
    measure.peak_bytes(lambda: torch.zeros(4), "cuda:1")
    assert {name for name, _ in cards.asked} == {
        "synchronize",
        "reset_peak_memory_stats",
        "memory_allocated",
        "max_memory_allocated",
    }
    assert {index for _, index in cards.asked} == {1}


@pytest.mark.parametrize(("named", "current"), [("cuda:1", 1), ("cuda", 0), ("cpu", 0)])
def test_a_benchmark_makes_the_device_that_is_named_by_number_current(cards, named, current):
    measure.use_device(named)
    assert cards.current == current


def test_a_diffusers_processor_gives_each_device_its_own_weights():
    from sla2_diffusers import Settings, SLA2WanProcessor

    weights = torch.eye(4), None, torch.ones(2)
    settings = Settings(0.9, "16bit", 0, frozenset(), "torch", "16bit")
    processor = SLA2WanProcessor(None, settings, 0, weights, True, None, [])
    here, there = processor._weights_on(CPU), processor._weights_on(torch.device("meta"))
    assert [w.device.type for w in here if w is not None] == ["cpu", "cpu"]
    assert [w.device.type for w in there if w is not None] == ["meta", "meta"]
    assert here[1] is there[1] is None
    assert processor._weights_on(torch.device("meta")) is there
