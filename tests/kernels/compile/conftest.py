"""Every kernel compiled for cards that are not there: needs Triton, and no GPU."""

import importlib.util

import pytest
import torch

from sla2_kernels import sla2_attention, support
from sla2_kernels.support import interpreting


def _why_not():
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return "Triton's interpreter compiles nothing; unset TRITON_INTERPRET" if interpreting() else None


class NotCompiled(pytest.Module):
    """A test module that is not even imported: it needs the compiler."""

    def collect(self):
        pytest.skip(_why_not(), allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    return NotCompiled.from_parent(parent, path=module_path) if _why_not() else None


@pytest.fixture(scope="session", autouse=True)
def kernel_cache(tmp_path_factory):
    """A cache of its own: what is tested is compiled here and now."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture
def compile_for(monkeypatch):
    """compile_for(card) makes the operator's launches compile for that card; what it returns lists the kernels.

    compile_for(card, compiling=False): they are only taken down.
    """
    from ahead_of_time import TRITON, Recorder

    def begin(card, **options):
        if card.oldest_triton > TRITON:
            known = ".".join(map(str, card.oldest_triton))
            pytest.skip(f"Triton {'.'.join(map(str, TRITON))} cannot compile for {card}; {known} can")
        monkeypatch.setenv("SLA2_INTERPRET_CAPABILITY", "{}.{}".format(*card.capability))
        # the tensors are on the CPU; every other reason not to run still counts
        monkeypatch.setattr(support, "_card_reason", lambda device: None)
        return Recorder(monkeypatch, card, **options)

    return begin


@pytest.fixture
def attend():
    """attend(...) calls the operator on zeros, for its launches; ratio: "learned", "estimated" or "none" (all selected)."""

    from ahead_of_time import HEADS, TOKENS

    def call(dtype, head_dim, precision, ratio, *, qkv=None, **options):
        qkv = qkv or [torch.zeros(1, HEADS, TOKENS, head_dim, dtype=dtype) for _ in range(3)]
        return sla2_attention(
            *qkv,
            *(torch.eye(head_dim) for _ in range(2)),
            torch.full((HEADS,), 0.5) if ratio == "learned" else None,
            **({"sparsity": 0.0 if ratio == "none" else 0.5} | options),
            precision=precision,
            backend="triton",
        )

    return call
