"""A sparse call that fails while it runs is made good by dense attention, counted and said; anything else is raised as it came."""

import importlib.util
import json
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

HEADS = 2
NAN = float("nan")


@pytest.fixture
def failure(pack_module):
    return pack_module("nodes.attention.failures")


@pytest.fixture
def run_of(bench):
    """A bench in a run, and a function that ends the run and returns its report data and text."""

    def begin(**settings):
        b = bench(**settings)
        b.hook.begin_run()
        b.model_call()
        return b

    return begin


@pytest.fixture
def end(pack_module):
    def end(b):
        report = pack_module("nodes.runs.report_text")
        b.hook.end_run()
        run = b.hook.runs.finished()[-1]
        data = report.report_data(b.hook, run)
        assert json.loads(json.dumps(data, allow_nan=False)) == data
        return data, report.report_text(b.hook, run)

    return end


def spoilt(qkv, which, value=NAN):
    changed = [tensor.clone() for tensor in qkv]
    changed[which][0, 7, 3] = value
    return changed


@pytest.mark.parametrize("value", [NAN, float("inf"), float("-inf")])
@pytest.mark.parametrize("which", range(3), ids="qkv")
def test_a_layer_whose_first_sparse_output_is_not_finite_runs_dense_for_the_run(
    run_of, end, failure, qkv, which, value
):
    b, bad = run_of(), spoilt(qkv, which, value)
    dense = b.attention(*bad, heads=HEADS)
    # an infinite key is one that all queries with a matching sign attend: dense attention may be finite, and is what counts
    assert torch.equal(b.attend(*bad, heads=HEADS, layer=2), dense) or dense.isnan().any()
    assert torch.equal(b.attend(*qkv, heads=HEADS, layer=2), b.attention(*qkv, heads=HEADS))
    b.attend(*qkv, heads=HEADS, layer=1)
    data, text = end(b)
    assert [(row["layer"], row["sparse"], row["dense"]) for row in data["layers"]] == [
        (1, 1, {}),
        (2, 0, {failure.NOT_FINITE: 2}),
    ]
    assert [sorted(row["milliseconds"]) for row in data["layers"]] == [["sparse"], ["dense"]]
    (note,) = data["notes"]
    assert note.startswith("layer 2: sparse attention gave NaN or infinity (its inputs held them already)")
    assert note in text
    # the next run tries again
    b.hook.begin_run()
    b.model_call()
    b.attend(*qkv, heads=HEADS, layer=2)
    assert b.run.layers[2].sparse == 1


def test_nan_that_sparse_attention_makes_itself_is_told_from_nan_that_came_in(
    run_of, end, qkv, pack_module, monkeypatch
):
    def broken(part, *args, **kwargs):
        out, *rest = sparse_request(part, *args, **kwargs)
        out[0, 0, 0, 0] = NAN
        return out, *rest

    way = pack_module("nodes.attention.self_attention")
    sparse_request = way.sparse_request
    monkeypatch.setattr(way, "sparse_request", broken)
    b = run_of()
    assert torch.equal(b.attend(*qkv, heads=HEADS), b.attention(*qkv, heads=HEADS))
    data, _ = end(b)
    assert "(its inputs were finite)" in data["notes"][0]


def test_later_nan_is_counted_without_waiting_and_reported_after_the_run(run_of, end, qkv, monkeypatch):
    b = run_of()
    b.attend(*qkv, heads=HEADS)

    def read(*_):
        raise AssertionError("the device was waited for")

    with monkeypatch.context() as patch:
        for name in ("item", "cpu", "tolist", "__bool__", "__float__", "__int__"):
            patch.setattr(torch.Tensor, name, read)
        for _ in range(3):
            out = b.attend(*spoilt(qkv, 2), heads=HEADS)
        b.attend(*qkv, heads=HEADS)
    assert out.isnan().any()
    data, text = end(b)
    (row,) = data["layers"]
    assert (row["sparse"], row["not_finite"], row["dense"]) == (5, 3, {})
    assert any("3 in layer 0" in note for note in data["notes"]) and "3 outputs with NaN or infinity" in text


def test_a_run_without_nan_says_nothing_of_it(run_of, end, qkv):
    b = run_of()
    b.attend(*qkv, heads=HEADS)
    data, text = end(b)
    assert data["notes"] == [] and data["layers"][0]["not_finite"] == 0 and "NaN" not in text


def failing_with(monkeypatch, pack_module, error, times=10**9):
    """sparse_request raises; the list of its attempts."""
    way, attempts = pack_module("nodes.attention.self_attention"), []
    sparse_request = way.sparse_request

    def fail(*args, **kwargs):
        attempts.append(1)
        if len(attempts) > times:
            return sparse_request(*args, **kwargs)
        raise error() if isinstance(error, type) else error

    monkeypatch.setattr(way, "sparse_request", fail)
    return attempts


MEMORY = {
    "CUDA": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    "driver": RuntimeError("CUDA error: out of memory"),
    "host": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried to"
    ),
    "Windows host": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."),
}


@pytest.mark.parametrize("error", MEMORY.values(), ids=MEMORY)
def test_out_of_memory_runs_dense_for_the_rest_of_the_step(
    run_of, end, failure, qkv, error, monkeypatch, pack_module, caplog
):
    attempts = failing_with(monkeypatch, pack_module, error, times=1)
    b = run_of()
    dense = b.attention(*qkv, heads=HEADS)
    for layer in range(3):
        assert torch.equal(b.attend(*qkv, heads=HEADS, layer=layer), dense)
    assert len(attempts) == 1
    b.model_call()
    b.attend(*qkv, heads=HEADS, layer=0)
    data, _ = end(b)
    assert [row["dense"] for row in data["layers"]] == [{failure.OUT_OF_MEMORY: 1}] * 3
    assert data["sparse_calls"] == 1
    assert len([record for record in caplog.records if "memory ran out" in record.getMessage()]) == 1


@pytest.mark.parametrize("error", MEMORY.values(), ids=MEMORY)
def test_no_memory_for_the_dense_rows_runs_dense_for_the_rest_of_the_step(
    run_of, end, failure, qkv, error, monkeypatch, pack_module
):
    """The video's output is there; what lacks is room for text and sound rows, or for both together. It was measured in vain."""
    attempts = []

    def join(*_):
        attempts.append(1)
        raise error

    monkeypatch.setattr(pack_module("nodes.attention.self_attention"), "with_dense_rows", join)
    b = run_of()
    dense = b.attention(*qkv, heads=HEADS)
    for layer in range(3):
        assert torch.equal(b.attend(*qkv, heads=HEADS, layer=layer), dense)
    data, _ = end(b)
    assert len(attempts) == 1 and data["sparse_calls"] == 0
    assert [row["dense"] for row in data["layers"]] == [{failure.OUT_OF_MEMORY: 1}] * 3
    run = b.hook.runs.finished()[-1]
    assert run.attention_error is None and run.layers[0].attention_error is None


def test_another_error_of_the_dense_rows_is_raised_as_it_came(run_of, end, qkv, monkeypatch, pack_module):
    error = RuntimeError("another pack's attention")

    def join(*_):
        raise error

    monkeypatch.setattr(pack_module("nodes.attention.self_attention"), "with_dense_rows", join)
    b = run_of()
    with pytest.raises(RuntimeError, match="another pack's") as caught:
        b.attend(*qkv, heads=HEADS)
    assert caught.value is error and end(b)[0]["sparse_calls"] == 0


def test_an_allocation_that_really_fails(run_of, end, failure, qkv, monkeypatch, pack_module):
    b = run_of()
    dense = b.attention(*qkv, heads=HEADS)
    monkeypatch.setattr(
        pack_module("nodes.attention.self_attention"), "sparse_request", lambda *a, **k: torch.empty(2**60)
    )
    assert torch.equal(b.attend(*qkv, heads=HEADS), dense)
    data, _ = end(b)
    assert data["layers"][0]["dense"] == {failure.OUT_OF_MEMORY: 1}


def test_what_the_failed_attempt_held_is_free_before_dense_attention_runs(run_of, qkv, monkeypatch, pack_module):
    held = []

    def hold(*_, **__):
        workspace = torch.empty(1000)
        held.append(weakref.ref(workspace))
        raise torch.OutOfMemoryError("CUDA out of memory")

    def below(func, *args, **kwargs):
        assert held and held[0]() is None
        return func(*args, **kwargs)

    monkeypatch.setattr(pack_module("nodes.attention.self_attention"), "sparse_request", hold)
    b = run_of()
    b.override = b.override_over(below)
    b.model_call()
    b.attend(*qkv, heads=HEADS)
    assert len(held) == 1


def of_triton(name, message):
    return type(name, (Exception,), {"__module__": "triton.runtime.errors"})(message)


SM_121 = (
    "PTXAS error: Internal Triton PTX codegen error\n`ptxas` stderr:\n"
    "ptxas fatal   : Value 'sm_121a' is not defined for option 'gpu-name'\n\nRepro command: ptxas --gpu-name=sm_121a\n"
)
# as users reported them (the repository and number of the issue), or as they are made on this system
KERNELS = {
    "read-only cache": PermissionError(13, "Permission denied", "/cache/triton"),
    "full disk": OSError(28, "No space left on device"),
    "no compiler": RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
    "no C++ compiler": RuntimeError("Failed to find C++ compiler. Please specify via CXX environment variable or set triton.knobs.build.impl."),
    "no headers": subprocess.CalledProcessError(1, ["gcc", "main.c"]),
    "no gcc": FileNotFoundError(2, "No such file or directory", "gcc"),
    "shared memory": of_triton("OutOfResources", "out of resource: shared memory, Required: 200000, Hardware limit: 101376."),
    "triton 1556": RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
    "auto-round 2048": RuntimeError("Triton Error [CUDA]: no kernel image is available for execution on the device"),
    "CUDA's error 222": RuntimeError("Triton Error [CUDA]: the provided PTX was compiled with an unsupported toolchain."),
    "triton 5570": RuntimeError("0 active drivers ([]). There should only be one."),
    "triton 2985": RuntimeError("2 active drivers ([<class 'c.CudaDriver'>, <class 'nvi.CudaDriver'>]). There should only be one."),
    "triton-windows 21": ImportError("DLL load failed while importing cuda_utils: The specified module could not be found."),
    "triton-windows 87": ImportError("DLL load failed while importing libtriton: A dynamic link library (DLL) initialization routine failed."),
    "pytorch 123054": ImportError("/home/u/.triton/cache/AB/__triton_launcher.so: failed to map segment from shared object"),
    "no libcuda": RuntimeError("Failed to open libcuda.so.1"),
    "old libcuda": RuntimeError("Failed to retrieve cuTensorMapEncodeTiled from libcuda.so.1"),
    "mamba 14": AssertionError("libcuda.so cannot found!"),
    "triton 8539": of_triton("PTXASError", SM_121),
    "mlcommons training 826": RuntimeError("Internal Triton PTX codegen error: \nptxas fatal   : Value 'sm_100' is not defined for option 'gpu-name'\n"),
    "HunyuanVideoWrapper 48": RuntimeError("`ptxas` failed with error code 4294967295: \n"),
    "HunyuanVideoWrapper 29": RuntimeError("Cannot find ptxas.exe"),
    "triton-windows 49": RuntimeError("Triton only support CUDA 10.0 or higher, but got CUDA version: 12.8"),
    "FramePack 350": RuntimeError("PassManager::run failed"),
    "pytorch 125807": ModuleNotFoundError("No module named 'triton.ops'", name="triton.ops"),
}  # fmt: skip


@pytest.mark.parametrize("error", KERNELS.values(), ids=KERNELS)
def test_a_kernel_that_cannot_be_built_runs_every_layer_dense(
    run_of, end, failure, qkv, error, monkeypatch, pack_module
):
    attempts = failing_with(monkeypatch, pack_module, error)
    b = run_of()
    dense = b.attention(*qkv, heads=HEADS)
    for layer in (0, 1, 0):
        assert torch.equal(b.attend(*qkv, heads=HEADS, layer=layer), dense)
    data, _ = end(b)
    assert len(attempts) == 1 and data["sparse_calls"] == 0
    assert [row["dense"] for row in data["layers"]] == [{failure.NO_KERNEL: 2}, {failure.NO_KERNEL: 1}]
    (note,) = data["notes"]
    assert type(error).__name__ in note and str(error).splitlines()[0][:60].strip() in note and "\n" not in note
    assert "ptxas fatal" in note or "ptxas fatal" not in str(error), "the line that says what is wrong"
    helps = note.rpartition("); ")[2]
    assert re.match("(update|delete|install|tooling/doctor.py) ?", helps), helps


@torch.no_grad()
@pytest.mark.parametrize("references", [(), ((0, 200),)], ids=["text alone", "references"])
@pytest.mark.parametrize(
    "error", [KERNELS["shared memory"], MEMORY["CUDA"], ValueError("ours")], ids=["kernel", "memory", "ours"]
)
def test_the_sparse_loop_fails_on_the_exact_rows_alone(
    run_of, end, error, references, monkeypatch, pack_module, caplog
):
    """The video's tokens stay sparse; PyTorch's attention computes the rows of text and sound."""
    way, rows, attempts = pack_module("nodes.attention.self_attention"), pack_module("sla2_kernels.exact_rows"), []

    def fail(*_, **__):
        attempts.append(1)
        raise error

    monkeypatch.setattr(way, "takes_rows", lambda request: True)
    monkeypatch.setattr(rows, "takes_exact_rows", lambda *_: True)
    monkeypatch.setattr(rows, "sla2_attention", fail)
    generator = torch.Generator().manual_seed(0)
    qkv = [torch.randn(1, 900, HEADS * 64, generator=generator) for _ in range(3)]
    b, override = run_of(grid=(6, 10, 10), front=260, references=references), pack_module("nodes.attention.override")
    monkeypatch.setattr(override, "DEFAULT", override.name_of(b.attention))
    dense = b.attention(*qkv, heads=HEADS)
    if isinstance(error, ValueError):
        with pytest.raises(ValueError, match="ours"):
            b.attend(*qkv, heads=HEADS)
        return
    if error is KERNELS["shared memory"]:
        stopping = run_of(grid=(6, 10, 10), front=260, references=references, stop_on_unsupported=True)
        with pytest.raises(RuntimeError, match="SLA2 stopped in layer 0"):
            stopping.attend(*qkv, heads=HEADS)
        attempts.clear()
    outs = [b.attend(*qkv, heads=HEADS, layer=layer) for layer in (0, 1, 0)]
    data, text = end(b)
    assert len(attempts) == 1
    run = b.hook.runs.finished()[-1]
    if error is MEMORY["CUDA"]:
        assert all(torch.equal(out, dense) for out in outs) and data["notes"] == []
        assert run.attention_error is None and data["sparse_calls"] == 0
        return
    first = references[0][1] if references else 0
    for out in outs:
        for exact in (slice(first, 260), slice(860, 900)):
            torch.testing.assert_close(out[:, exact], dense[:, exact])
        assert not torch.allclose(out[:, 260:860], dense[:, 260:860], atol=1e-3)
    assert data["sparse_calls"] == 3 and not any(row["dense"] for row in data["layers"]) and not run.failed_layers
    assert run.attention_error > 0
    (note,) = data["notes"]
    assert note.startswith(
        "PyTorch's attention computed the rows of text and sound of 3 calls: the kernels could not be"
    )
    assert "OutOfResources" in note and note in text
    assert len([record for record in caplog.records if "rows of text and sound" in record.getMessage()]) == 1


CACHES = {"a file in its way": None, "read-only file system": "ro", "full disk": "size=4k"}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("mount", CACHES.values(), ids=CACHES)
def test_triton_cannot_write_its_cache(tmp_path, mount, in_a_small_disk):
    """The real Triton compiling for a card, its cache where it cannot write: one of the failures that run dense."""
    script = Path(__file__).with_name("compile_one_kernel.py")
    command = [sys.executable, str(script), str(tmp_path / "cache" / "below"), str(Path(__file__).parents[2])]
    if mount is None:
        (tmp_path / "cache").touch()
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    else:
        (tmp_path / "cache").mkdir()
        done = in_a_small_disk(tmp_path / "cache", mount, command)
    assert done.stdout.split()[0] == "True", done


class Interrupted(BaseException):
    """As comfy.model_management.InterruptProcessingException."""


LOST = RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
OURS = ImportError("cannot import name 'pool' from 'sla2_kernels.kernels.pool'", name="sla2_kernels.kernels.pool")


@pytest.mark.parametrize(
    "error", [KeyError, ValueError, RuntimeError, AssertionError, Interrupted, KeyboardInterrupt, LOST, OURS], ids=repr
)
def test_any_other_error_is_raised_as_it_came(run_of, qkv, error, monkeypatch, pack_module):
    failing_with(monkeypatch, pack_module, error)
    b = run_of()
    with pytest.raises(error if isinstance(error, type) else type(error)):
        b.attend(*qkv, heads=HEADS)
    assert not b.hook.handed_on.is_running and not b.run.failed_layers


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), PermissionError(13, "Permission denied")]
)
def test_with_stop_the_failure_stops(run_of, qkv, error, monkeypatch, pack_module):
    failing_with(monkeypatch, pack_module, error)
    with pytest.raises(RuntimeError, match="SLA2 stopped in layer 0"):
        run_of(stop_on_unsupported=True).attend(*qkv, heads=HEADS)


@pytest.mark.parametrize(("error", "tries"), [(OSError, 1), (torch.OutOfMemoryError, 2)])
def test_an_error_of_the_chain_below_is_its_own(bench, qkv, error, tries):
    """Dense rows go down the chain: what fails there is no failure of ours, and is not tried twice; but without memory the
    whole call is, when what the sparse attempt held is free."""
    calls = []

    def below(func, *args, **kwargs):
        calls.append(1)
        raise error("theirs")

    b = bench(grid=(2, 10, 10), front=100)
    b.hook.begin_run()
    b.override = b.override_over(below)
    b.model_call()
    with pytest.raises(error, match="theirs"):
        b.attend(*qkv, heads=HEADS)
    assert len(calls) == tries and not b.run.failed_layers and not b.hook.handed_on.is_running
