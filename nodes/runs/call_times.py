"""The mean time of one kind of call, however many there are."""

from collections import deque

MAX_PENDING = 64  # pairs of events; a call that would be one more is not measured


class CallTimes:
    """Sums on the host, and the few pairs of CUDA events that the device has not reached yet. The caller holds a lock."""

    def __init__(self):
        self._calls, self._total = 0, 0.0
        self._pending = deque()

    def add(self, milliseconds):
        self._calls += 1
        self._total += milliseconds

    def add_events(self, start, end):
        """A call between two recorded events, whose time is known later."""
        self._pending.append((start, end))

    def has_room(self):
        """Whether one more pair of events may wait; those that the device has passed are summed up. Not while it captures."""
        while self._pending and self._pending[0][1].query():
            self._sum_up()
        return len(self._pending) < MAX_PENDING

    def mean(self):
        """Milliseconds, or None where nothing was measured. Waits for the device."""
        while self._pending:
            self._pending[0][1].synchronize()
            self._sum_up()
        return self._total / self._calls if self._calls else None

    def clear(self):
        self._pending.clear()

    def _sum_up(self):
        start, end = self._pending.popleft()
        self.add(start.elapsed_time(end))
