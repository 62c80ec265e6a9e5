"""The Triton kernels on CPU tensors, in Triton's interpreter (TRITON_INTERPRET=1), on poisoned memory.

bfloat16 products are left out here: the interpreter multiplies bfloat16's bit patterns.
"""

import importlib.util
import math

import pytest
import torch

from sla2_kernels.support import interpreting

GUARD = 256  # elements of poison before and after every tensor that the package allocates


def _why_not():
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None if interpreting() else "needs TRITON_INTERPRET=1, in a process of its own (run_tests.py)"


class NotInterpreted(pytest.Module):
    """A test module that is not even imported: its kernels would be compiled ones."""

    def collect(self):
        pytest.skip(_why_not(), allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    return NotInterpreted.from_parent(parent, path=module_path) if _why_not() else None


def _poison(dtype):
    return torch.nan if dtype.is_floating_point else torch.iinfo(dtype).min if dtype.itemsize == 1 else -1


def _is_poison(tensor):
    if tensor.dtype.is_floating_point:
        return tensor.float().isnan()
    return tensor == _poison(tensor.dtype)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """torch.empty returns NaN between guards of NaN: unwritten output shows, and so does a write outside."""
    original, guarded = torch.empty, []

    def poisoned_empty(*size, dtype=None, device=None, **options):
        shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        numel = math.prod(shape)
        flat = original(numel + 2 * GUARD, dtype=dtype, device=device, **options)
        if flat.device.type != "cpu":
            return original(shape, dtype=dtype, device=device, **options)
        flat.fill_(_poison(flat.dtype))
        guarded.append(flat)
        return flat[GUARD : GUARD + numel].view(shape)

    monkeypatch.setattr(torch, "empty", poisoned_empty)
    yield
    for flat in guarded:
        assert _is_poison(flat[:GUARD]).all() and _is_poison(flat[-GUARD:]).all(), "a kernel wrote outside its output"


@pytest.fixture
def wide_tiles(monkeypatch):
    """The masked sum in few large tiles: the interpreter pays per program. Its own tests run every card's tiles."""
    from sla2_kernels.kernels import configs

    wide = configs.ProductConfig(tile_m=16, tile_n=4096, tile_k=32, num_warps=4, num_stages=1)
    monkeypatch.setattr(configs, "product_config", lambda capability, element_size: wide)
