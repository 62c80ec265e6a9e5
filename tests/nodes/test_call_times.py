"""Times of calls: a mean, however many there are. Events of a GPU are stood in for."""

import weakref
from collections import deque

import pytest
import torch

CALLS = 500


class Device:
    """Work that is done ``lag`` events after it was asked for."""

    def __init__(self, lag):
        self.lag, self.reached, self.asked = lag, 0, deque()

    def current_stream(self, device=None):
        return self

    def Event(self, enable_timing):
        return Event(self)


class Event:
    alive = weakref.WeakSet()

    def __init__(self, device):
        self.device, self.number = device, None
        Event.alive.add(self)

    def record(self, stream):
        self.number = stream.reached + stream.lag
        stream.reached += 1

    def query(self):
        return self.number <= self.device.reached

    def synchronize(self):
        self.device.reached = max(self.device.reached, self.number)

    def elapsed_time(self, end):
        assert self.query() and end.query(), "an event that the device has not reached has no time"
        return 2.0


@pytest.mark.parametrize("lag", [0, 20, 10**9], ids=["at once", "behind", "never"])
def test_a_long_training_keeps_few_events_and_waits_for_none(bench, pack_module, monkeypatch, lag):
    device = Device(lag)
    monkeypatch.setattr(torch.cuda, "Event", device.Event)
    monkeypatch.setattr(torch.cuda, "current_stream", device.current_stream)
    monkeypatch.setattr(pack_module("nodes.runs.record"), "capturing", lambda _: False)
    hook = bench().hook
    hook.begin_run()
    run = hook.run_for_call()
    for _ in range(CALLS):
        with run.timed(0, "sparse", torch.device("cuda", 0)):
            pass
    assert len(Event.alive) <= 2 * pack_module("nodes.runs.call_times").MAX_PENDING
    assert device.reached == 2 * min(CALLS, CALLS if lag < 100 else 64), "waited for the device"
    hook.end_run()
    assert run.layers[0].milliseconds == {"sparse": 2.0} and not Event.alive


def test_the_clock_of_a_cpu_is_summed_up(bench, pack_module, monkeypatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr(pack_module("nodes.runs.record").time, "perf_counter", lambda: next(ticks))
    hook = bench().hook
    hook.begin_run()
    run = hook.run_for_call()
    for _ in range(CALLS):
        with run.timed(0, "dense", torch.device("cpu")):
            pass
    held = [value for value in vars(run.layers[0].times["dense"]).values() if isinstance(value, (list, deque))]
    assert not any(held)
    hook.end_run()
    assert run.layers[0].milliseconds == {"dense": 1000.0}
