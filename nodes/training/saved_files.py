"""The files that a save node wrote. While they exist, ComfyUI may use the node's cached result."""

import os
import threading
from collections import Counter


class SavedFiles:
    """Paths by the name that was asked for. Several threads may add and ask."""

    def __init__(self):
        self._paths = {}
        self._losses = Counter()
        self._lock = threading.Lock()

    def add(self, name, path):
        with self._lock:
            self._paths.setdefault(name, set()).add(path)

    def losses(self, name=None):
        """How often files that were saved as ``name`` were found to be gone; None: as any name."""
        with self._lock:
            for known, paths in self._paths.items():
                gone = {path for path in paths if not os.path.exists(path)}
                if gone and name in (None, known):
                    paths -= gone
                    self._losses[known] += 1
            return self._losses.total() if name is None else self._losses[name]
