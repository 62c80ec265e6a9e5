"""A recorded call replayed in Triton's interpreter: the same bits, in one piece of memory that was full of NaN, and whichever of
its two streams is ahead."""

import ctypes
from functools import partial
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


class Stream:
    """Runs at once what it is given, or, where it is ``late``, only when another waits for it."""

    def __init__(self, late=False):
        self.late, self.waiting, self.ran = late, [], 0

    @property
    def cuda_stream(self):
        return self

    def take(self, work):
        self.waiting.append(work)
        if not self.late:
            self.run()

    def run(self):
        while self.waiting:
            self.waiting.pop(0)()
            self.ran += 1

    def wait_stream(self, other):
        # whoever waits is not ahead
        other.run()
        self.run()


@pytest.fixture
def streams(monkeypatch):
    """The current stream and the one beside it, of which the tests choose the one that is late."""
    made = Stream(), Stream()
    monkeypatch.setattr(module, "_current_and_beside", lambda: made)
    return made


@pytest.fixture
def recordings(monkeypatch, streams):
    """Calls are recorded and replayed on the CPU, as they are on a GPU; yields the recordings."""
    made = {}

    def compiled(kernel, grid, arguments, names):
        dtypes = [x.dtype if isinstance(x, torch.Tensor) else None for x in arguments]

        def run(x, y, z, *rest):
            given = [a if dtype is None else at(a, dtype) for a, dtype in zip(rest[6:], dtypes, strict=True)]
            work = partial(kernel[x, y, z], **dict(zip(names, given, strict=True)))
            rest[0].take(work) if isinstance(rest[0], Stream) else work()

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
    monkeypatch.setattr(triton_backend, "_head_groups", lambda q, per_head, lanes=1: [slice(0, 1), slice(1, 2)])
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


@pytest.mark.usefixtures("wide_tiles")
@pytest.mark.parametrize("late", [0, 1], ids=["the current stream is late", "the other stream is late"])
@pytest.mark.parametrize(("precision", "ratio"), [("16bit", "estimated"), ("int8", "fitted")])
def test_the_order_of_two_streams_changes_no_bit(generator, monkeypatch, recordings, streams, precision, ratio, late):
    monkeypatch.setattr(triton_backend, "_lanes", lambda device: 2)
    groups = [slice(0, 2), slice(2, 4)]
    monkeypatch.setattr(triton_backend, "_head_groups", lambda q, per_head, lanes=1: groups)
    sample, outs = None, []
    if ratio == "fitted":
        sample = triton_backend.Sample(sample_rows(70, 0), 24, torch.empty(2, 2, 32, 32), torch.empty(2, 2))
    inputs = attention_inputs(generator, batch=2, heads=2, tokens=70, keys=260, head_dim=32)
    streams[late].late = True
    for _ in range(2):
        out = torch.empty_like(inputs.q)
        found, blocks = triton_backend.attention(
            *inputs.tensors()[:5], None, None, out, sample=sample, sparsity=0.5, scale=0.125, precision=precision
        )
        outs.append((out, found, blocks))
    assert len(recordings) == 1 and streams[1].ran > 0
    assert all(map(torch.equal, outs[1], outs[0]))
