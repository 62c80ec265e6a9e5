"""The model calls that run at this moment in this thread, as the wrappers around them see them."""

import contextlib
import threading
from dataclasses import dataclass
from typing import Any


@dataclass
class Frame:
    """One model call seen by one wrapper.

    inputs: function that returns the model's arguments by name. options: its transformer_options. call: ModelCall, made when
    a wrapper next to the model or the first mark needs it. current: the attention override that the options came with.
    passed_on: a wrapper nearer to the model took over.
    """

    diffusion_model: Any
    inputs: Any
    options: dict
    call: Any = None
    current: Any = None
    passed_on: bool = False


class ModelFrames:
    """A stack of frames per thread (MultiGPU runs one model call in each)."""

    def __init__(self):
        self._local = threading.local()

    @property
    def current(self):
        """The innermost Frame, or None outside of every model call."""
        frames = getattr(self._local, "frames", None)
        return frames[-1] if frames else None

    @contextlib.contextmanager
    def opened(self, frame):
        frames = self._local.__dict__.setdefault("frames", [])
        if frames:
            frames[-1].passed_on = True
        frames.append(frame)
        try:
            yield
        finally:
            frames.pop()
