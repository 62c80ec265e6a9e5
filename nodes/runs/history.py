"""The sampling runs of one patched clone: one under way at most, and the last few finished ones."""

import collections
import threading

from ..compat.executing import executing_context
from .record import RunRecord

KEPT_RUNS = 8


class RunHistory:
    """Starts and ends runs. A patched MODEL is cached by ComfyUI and sampled many times: every run starts from zero."""

    def __init__(self, layers, notes=()):
        self._layers = layers
        self._notes = tuple(notes)
        self._finished = collections.deque(maxlen=KEPT_RUNS)
        self._run = None
        self._depth = 0
        self._count = 0
        self._lock = threading.Lock()

    def add_notes(self, notes):
        """More sentences for every run from now on."""
        self._notes += tuple(notes)

    def begin(self, window=None):
        """Starts a run; inside a run that has begun already, only goes one level deeper."""
        with self._lock:
            self._depth += 1
            if self._depth == 1:
                self._start(window)

    def end(self, failure=None, output=None):
        """Ends what ``begin`` began; the closed RunRecord, or None where an outer level still runs."""
        with self._lock:
            self._depth -= 1
            if self._depth:
                return None
            run, self._run = self._run, None
            self._finished.append(run)
        run.close(failure, output)
        return run

    def current(self, window):
        """The run under way. Calls without a sampler get a run of their own per executing node; window() is its window."""
        with self._lock:
            if self._depth == 0 and (self._run is None or self._run.context != executing_context()):
                self._start(window())
            return self._run

    def forget(self):
        """Drops what calls without a sampler left behind: a long training would keep the times of its every call."""
        with self._lock:
            if self._depth == 0 and self._run is not None:
                self._run.close("dropped")
                self._run = None

    def finished(self):
        """Closed runs, oldest first. A run without a sampler ends when this is called."""
        with self._lock:
            if self._depth == 0:
                self._file_stray()
            return list(self._finished)

    def _start(self, window):
        self._file_stray()
        self._count += 1
        self._run = RunRecord(self._count, self._layers, executing_context(), window)
        for sentence in self._notes:
            self._run.note(sentence)

    def _file_stray(self):
        if self._run is not None:
            self._run.close()
            self._finished.append(self._run)
            self._run = None
