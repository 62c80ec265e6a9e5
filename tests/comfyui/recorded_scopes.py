"""What ComfyUI's allocation recording sees of a model, imitated on a CPU: storages made inside a scope that outlive it.

ComfyUI 0.35 and newer records the allocations of some models' calls and of each of their blocks, to replay them. Memory
that is taken inside a scope and kept after it breaks the record.
"""

import contextlib

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def storages(values):
    return {t.untyped_storage()._cdata: t.untyped_storage() for t in tree_leaves(values) if isinstance(t, torch.Tensor)}


class RecordedScopes(TorchDispatchMode):
    """On while a model runs; ``left`` counts what was made in a block or in a model call, is alive after it and no output."""

    def __init__(self, model, blocks):
        super().__init__()
        self.open, self.calls, self.left = [], [], {"block": 0, "call": 0}
        self._hooks = [hook for block in blocks for hook in self._watch(block, self._end_block)]
        self._hooks += self._watch(model, self.calls.append)

    def _watch(self, module, end):
        def begin(*_):
            self.open.append({})

        def close(_, args, output):
            made, given = self.open.pop(), storages(output)
            end({key: made[key] for key in made.keys() - given.keys()})

        return module.register_forward_pre_hook(begin), module.register_forward_hook(close)

    def _end_block(self, made):
        self.left["block"] += alive(made)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = storages((args, kwargs))
        out = func(*args, **(kwargs or {}))
        for key, storage in storages(out).items():
            for scope in self.open if key not in known else ():
                scope[key] = StorageWeakRef(storage)
        return out

    @contextlib.contextmanager
    def watching(self):
        try:
            with self:
                yield self.left
        finally:
            self.left["call"] = sum(map(alive, self.calls))
            for hook in self._hooks:
                hook.remove()


def alive(made):
    return sum(not weak.expired() for weak in made.values())
