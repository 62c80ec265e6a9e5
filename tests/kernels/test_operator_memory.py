"""No tensor of N x M: the largest one that a long call makes stays within the chunk it was given."""

import functools

import pytest
import torch
from operator_inputs import normal
from torch.utils._python_dispatch import TorchDispatchMode

from sla2_kernels import select_key_blocks, sla2_attention, torch_backend
from sla2_kernels.video_attention import video_attention

TOKENS, HEAD_DIM = 8192, 32
CHUNK_BYTES = 8 * 2**20
DENSE_BYTES = 4 * TOKENS * TOKENS


class LargestStorage(TorchDispatchMode):
    """Records the bytes of the largest storage behind any tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.fixture
def long_inputs(generator, monkeypatch):
    monkeypatch.setattr(torch_backend, "CHUNK_BYTES", CHUNK_BYTES)
    return [normal(generator, 1, 1, TOKENS, HEAD_DIM) for _ in range(3)]


def test_the_measure_sees_a_dense_matrix(long_inputs):
    q, k, _ = long_inputs
    with LargestStorage() as largest:
        q @ k.transpose(2, 3)
    assert largest.bytes == DENSE_BYTES


def test_routing(long_inputs):
    with LargestStorage() as largest:
        select_key_blocks(*long_inputs[:2], sparsity=0.97)
    assert 0 < largest.bytes <= 4 * TOKENS * HEAD_DIM


@pytest.mark.parametrize("precision", ["16bit", "int8"])
@pytest.mark.parametrize("sparsity", [0.5, 0.97])
def test_forward(long_inputs, sparsity, precision):
    key_blocks = select_key_blocks(*long_inputs[:2], sparsity=sparsity)
    out = torch.empty_like(long_inputs[0])
    with torch.no_grad(), LargestStorage() as largest:
        torch_backend.attention(*long_inputs, key_blocks, None, out, scale=0.2, precision=precision)
    assert 0 < largest.bytes <= CHUNK_BYTES < DENSE_BYTES / 30


@pytest.mark.parametrize("layout", ["BHND", "BNHD"])
def test_the_output_is_allocated_once(generator, monkeypatch, layout):
    """Each head and exact row is written where it belongs: nothing as large as the output is made beside it."""
    q, k, v = (normal(generator, 1, 64, 64, 64, dtype=torch.bfloat16) for _ in range(3))
    made = []
    for name in ("empty", "stack", "cat", "empty_like", "zeros"):
        monkeypatch.setattr(torch, name, recorded(getattr(torch, name), made))
    for attend in (sla2_attention, functools.partial(video_attention, precision="int8", front=20, back=7)):
        made.clear()
        out = attend(q, k, v, sparsity=0.5, layout=layout)
        assert [tensor.shape for tensor in made if tensor.numel() >= out.numel()] == [out.shape]


def recorded(function, results):
    def call(*args, **kwargs):
        results.append(function(*args, **kwargs))
        return results[-1]

    return call


def test_backward(long_inputs):
    q, k, v = (x.requires_grad_() for x in long_inputs)
    out = sla2_attention(q, k, v, sparsity=0.9, precision="16bit")
    with LargestStorage() as largest:
        out.square().sum().backward()
    assert 0 < largest.bytes <= CHUNK_BYTES
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v))
