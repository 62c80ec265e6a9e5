"""sla2 doctor: what it prints on this machine, as users start it, and what it says of wrong kernels."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sla2_kernels.loops import TRITON, Loop
from tooling import doctor

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _short_benchmark(monkeypatch):
    monkeypatch.setattr(doctor, "BENCHMARK_S", 0.1)


def test_the_report_of_this_machine_can_be_pasted(capsys):
    assert doctor.main() == 0
    said = capsys.readouterr().out
    assert said.startswith("```text\nsla2 doctor\n") and said.endswith("```\n")
    for name in ("sla2-attention: ", "ComfyUI: ", "Python: ", f"PyTorch: {torch.__version__}", "Triton: ", "card"):
        assert name in said
    assert re.search(r"16bit: right, relative error 0\.\d+", said)
    if not torch.cuda.is_available():
        assert "16bit: ran in PyTorch's loop, block by block: the Triton kernels need an NVIDIA GPU" in said
    assert re.search(r"tokens, \d+ heads: dense [\d.]+ ms.*, SLA2 [\d.]+ ms \([\d.]+x as fast as dense", said)
    (paste,) = (line for line in said.splitlines() if line.strip().startswith("paste: "))
    assert re.search(r"error 16bit 0\.\d{4}.* \| [\w ]+: dense [\d.]+ / SLA2 [\d.]+ ms", paste)
    if not torch.cuda.is_available():
        assert "No speed-up on this machine: the Triton kernels need an NVIDIA GPU" in said
    assert str(Path.home()) not in said, "paths of the user's machine are not for an issue"


def test_wrong_kernels_are_called_wrong(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "sla2_attention", lambda q, k, v, **_: torch.zeros_like(q))
    assert doctor.main() == 1
    assert "16bit: WRONG, relative error 1.00000" in capsys.readouterr().out


def test_a_failing_call_is_named(monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(doctor, "sla2_attention", fail)
    assert doctor.main() == 1
    said = capsys.readouterr().out
    assert "16bit: FAILED: RuntimeError: out of resource: shared memory" in said and "no benchmark" in said


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (ImportError("DLL load failed while importing cuda_utils: not found."), "; install Microsoft's Visual C++"),
        (AssertionError("libcuda.so cannot found!"), "; update the NVIDIA driver"),
    ],
    ids=repr,
)
def test_kernels_that_cannot_be_loaded_are_named_with_what_helps(monkeypatch, capsys, error, part):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(doctor, "sla2_attention", fail)
    assert doctor.main() == 1
    assert f"16bit: FAILED: {type(error).__name__}: {error}{part}" in capsys.readouterr().out


@pytest.mark.parametrize("direct", [False, True])
def test_on_a_card_it_says_which_loop_ran_and_how_kernels_are_launched(monkeypatch, direct):
    launch = pytest.importorskip("sla2_kernels.kernels.launch")
    monkeypatch.setattr(launch, "DIRECT", direct)
    monkeypatch.setattr(doctor, "unsupported_reason", lambda *_: None)
    monkeypatch.setattr(doctor, "self_test", lambda *_: (0.0, Loop(TRITON, "the Hopper loop is for others")))
    monkeypatch.setattr(doctor, "first_calls", lambda device: "first call of SLA2: at once")
    monkeypatch.setattr(doctor, "sol_attn", lambda device: (None, "comfy-kitchen 0.2.31 has none"))
    monkeypatch.setattr(doctor, "default_precision", lambda device: "int8")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    failed = RuntimeError("out of memory")
    rows = [
        ("Wan", 32_760, 12, {"dense": (18.0, 2**30), "sol_attn": (1.8, 2**30), "SLA2": (0.9, 2**29)}),
        ("H3", 36_960, 56, {"dense": failed, "SLA2": (4.5, 2**29)}),
    ]
    monkeypatch.setattr(doctor, "benchmark", lambda device: rows)
    said = []
    assert doctor.check(torch.device("cuda", 0), said.append)
    assert said.count("int8: ran in Triton's loop: the Hopper loop is for others") == 1
    assert "SLA2 0.90 ms (20.00x as fast as dense, 2.00x as fast as sol_attn; 0.50 GiB)" in "\n".join(said)
    assert "dense failed (RuntimeError: out of memory), SLA2 4.50 ms (0.50 GiB)" in "\n".join(said)
    assert "ComfyUI's own sparse attention is not timed: comfy-kitchen 0.2.31 has none" in said
    assert said[-1].endswith("| Wan: dense 18.00 / sol_attn 1.80 / SLA2 0.90 ms | H3: dense - / SLA2 4.50 ms")
    assert any(line.startswith("slower at short lengths: ") for line in said) is not direct


def test_it_starts_as_a_file_without_the_folder_on_the_path(tmp_path):
    # as a portable ComfyUI's python_embeded does
    code = f"import runpy; runpy.run_path({str(ROOT / 'tooling' / 'doctor.py')!r}, run_name='doctor')['environment']()"
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_archive_holds_the_doctor_and_no_other_tool():
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    left_out = {line.rstrip("/") for line in lines}
    tools = {f"tooling/{path.name}" for path in (ROOT / "tooling").iterdir() if path.name != "__pycache__"}
    assert tools - left_out == {"tooling/__init__.py", "tooling/doctor.py"}, "name the new tool in .comfyignore"
