"""Which loop a call takes, told to whoever watches, and the one sentence why not the loop for Hopper cards."""

import threading

import pytest
import torch

from sla2_kernels import sla2_attention, support
from sla2_kernels.loops import TORCH, Loop, watch_loops

Q = torch.zeros(1, 2, 64, 144, dtype=torch.bfloat16)[..., :128]
ODD = torch.zeros(1, 2, 64, 272, dtype=torch.bfloat16)[..., 1:129]
# card, formats, q, k, v; part of the sentence
REFUSED = {
    "another card": ((8, 9), "int8", "fp8", Q, Q, Q, "compute capability 9.0 (H100, H200), and this one has 8.9"),
    "another format": ((9, 0), "fp8", "fp8", Q, Q, Q, "not in fp8 and fp8"),
    "head_dim": ((9, 0), "int8", "fp8", Q[..., :64], Q, Q, "head_dim 128, and this call has 64"),
    "float32": ((9, 0), "16bit", "16bit", Q.float(), Q, Q, "float16 and bfloat16, not float32"),
    "unaligned": ((9, 0), "16bit", "16bit", Q, ODD, ODD, "multiples of 16 bytes, unlike those of k and v"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_the_hopper_loop_says_why_not(monkeypatch, case):
    hopper = pytest.importorskip("sla2_kernels.kernels.hopper")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(hopper, "gluon_is_known", lambda: True)
    *call, part = case
    reason = hopper.why_not_hopper_loop(*call)
    assert part in reason and "\n" not in reason and not hopper.takes_hopper_loop(*call)
    assert hopper.why_not_hopper_loop((9, 0), "int8", "fp8", Q, ODD, ODD) is None


@pytest.mark.parametrize("version", ["3.5.0rc1", "3.10.0", "4.0rc1"])
def test_an_untested_triton_is_named(monkeypatch, version):
    hopper = pytest.importorskip("sla2_kernels.kernels.hopper")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("triton.__version__", version)
    monkeypatch.setattr(hopper, "gluon_is_known", hopper.gluon_is_known.__wrapped__)
    reason = hopper.why_not_hopper_loop((9, 0), "int8", "fp8", Q, Q, Q)
    assert reason == f"the Hopper loop was tested with Triton 3.6 to 3.9, and this is Triton {version}"


def test_who_watches_sees_the_calls_of_its_own_thread_and_block():
    q = torch.randn(1, 2, 200, 32)
    elsewhere = threading.Thread(target=sla2_attention, args=(q, q, q), kwargs={"sparsity": 0.5})
    with watch_loops() as outer:
        elsewhere.start()
        elsewhere.join()
        with watch_loops() as inner:
            sla2_attention(q, q, q, sparsity=0.5)
        sla2_attention(q, q, q, sparsity=0.5, backend="torch")
    sla2_attention(q, q, q, sparsity=0.5)
    reason = support.triton_reason(q.device, q.dtype, 32, "int8") or 'backend "torch" was asked for'
    assert inner == outer == [Loop(TORCH, reason)]
