"""A recorded call replayed in Triton's interpreter: the same bits, in one piece of memory that was full of NaN."""

import ctypes
from types import SimpleNamespace

import pytest
import torch
from operator_inputs import attention_inputs

from sla2_kernels import triton_backend
from sla2_kernels.fitted_attention import sample_rows
from sla2_kernels.kernels import launch as module


def at(address, dtype):
    """The element of this dtype that lies at an address, which is all that the interpreter asks of a tensor."""
    memory = (ctypes.c_byte * dtype.itemsize).from_address(address)
    return torch.frombuffer(memory, dtype=dtype)


@pytest.fixture
def recordings(monkeypatch):
    """Calls are recorded and replayed on the CPU, as they are on a GPU; yields the recordings."""
    made = {}

    def compiled(kernel, grid, arguments, names):
        dtypes = [x.dtype if isinstance(x, torch.Tensor) else None for x in arguments]

        def run(x, y, z, *rest):
            given = [a if dtype is None else at(a, dtype) for a, dtype in zip(rest[6:], dtypes, strict=True)]
            kernel[x, y, z](**dict(zip(names, given, strict=True)))

        return SimpleNamespace(run=run, function=None, packed_metadata=None)

    def launch(kernel, grid, *args, options, **constants):
        kernel[grid](*args, **constants, **options)
        recording = getattr(module._thread, "recording", None)
        if recording is not None:
            arguments = [*args, *(constants[name] for name in kernel.arg_names[len(args) :])]
            recording.add(compiled(kernel, grid, arguments, kernel.arg_names), grid, arguments)

    for name in ("pool", "score", "select", "pack", "masked_sum", "linear_attention", "sparse_attention", "unselected_mass",
                 "int8_pack", "int8_attention", "fitted_ratio", "weighted_mask"):  # fmt: skip
        monkeypatch.setattr(f"sla2_kernels.kernels.{name}.launch", launch)

    def cached(tensors, settings, call):
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        if settings in made:
            made[settings].replay(addresses, "cpu")
            return
        made[settings] = recording = module.Recording(tensors)
        with module._added_to(recording):
            call()
        recording.finish()

    empty = torch.empty

    def full_of_nan(*size, **options):
        # replay() alone asks for bytes
        memory = empty(*size, **options)
        return memory.fill_(255) if options.get("dtype") == torch.uint8 else memory

    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 0)
    monkeypatch.setattr(module, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(torch, "empty", full_of_nan)
    monkeypatch.setattr(triton_backend, "cached", cached)
    return made


@pytest.mark.usefixtures("wide_tiles")
@pytest.mark.parametrize(("precision", "ratio"), [("16bit", "given"), ("int8", "estimated"), ("int8", "fitted")])
def test_other_tensors_get_the_bits_of_a_call_that_was_recorded(generator, monkeypatch, recordings, precision, ratio):
    monkeypatch.setattr(triton_backend, "_head_groups", lambda q, per_head: [slice(0, 1), slice(1, 2)])
    options = {"sparsity": 0.5, "scale": 0.125, "precision": precision}
    rows, sample = sample_rows(70, 0), None
    if ratio == "fitted":
        sample = triton_backend.Sample(rows, 24, torch.empty(1, 2, 32, 32), torch.empty(1, 2))
    outs = []
    for seed in (1, 2, 1):
        inputs = attention_inputs(generator.manual_seed(seed), heads=2, tokens=70, keys=260, head_dim=32)
        given = torch.rand(2, 1, generator=generator) if ratio == "given" else None
        out = torch.empty_like(inputs.q)
        found, blocks = triton_backend.attention(*inputs.tensors()[:5], None, given, out, sample=sample, **options)
        outs.append((out, found, blocks))
    assert len(recordings) == 1
    assert all(map(torch.equal, outs[2], outs[0])) and not torch.equal(outs[1][0], outs[0][0])
    assert all(x.isfinite().all() for x in outs[1])
