"""The candidate loop for sm_90 compiles and fits; its orders of V are those that its registers undo."""

import pytest
import torch
import triton
from ahead_of_time import TRITON
from cards import CARDS, assert_fits

from sla2_kernels.triton_backend import Workspace

if TRITON < (3, 6):
    pytest.skip(f"Triton {triton.__version__} has no Gluon for Hopper as it is used here", allow_module_level=True)

from benchmarks.candidates import hopper_loop as candidate

HEADS, TOKENS, D = 2, 500, 128
HOPPER = next(card for card in CARDS if card.arch == 90)


@pytest.mark.parametrize("ratio", ["none", "learned", "estimated"])
@pytest.mark.parametrize("precision", ["int8", "16bit"])
def test_it_fits(compile_for, precision, ratio):
    kernels = compile_for(HOPPER).kernels
    q = torch.zeros(1, TOKENS, HEADS, D, dtype=torch.bfloat16).transpose(1, 2)
    low, numbers = precision == "int8", torch.zeros(64)
    work = Workspace(
        k_low=torch.zeros(HEADS, 8, 64, D, dtype=torch.int8), k_scale=numbers,
        v_low=torch.zeros(HEADS, 8, D, 64, dtype=torch.float8_e4m3fn), v_exponent=numbers, sums=None, query_sums=None,
    )  # fmt: skip
    candidate.hopper_sparse_attention(
        q, q, q, torch.empty_like(q), work, torch.zeros(HEADS, 4, 3, dtype=torch.int32), numbers, numbers,
        slice(0, HEADS), ratio=ratio, scale_log2=0.1, qk=precision, pv="fp8" if low else "16bit", q_block=128, block=64,
        programs=8,
    )  # fmt: skip
    (kernel,) = kernels
    print(kernel)
    assert_fits(kernel, HOPPER, spill=128)


def test_v_is_packed_in_the_orders_that_the_registers_undo():
    p, v = torch.randn(5, 64, dtype=torch.float64), torch.randn(64, D, dtype=torch.float64)
    packed = v.T[candidate.CHANNEL_ORDER][:, candidate.KEY_ORDER]
    # the kernel's own reshapes
    operand = p.reshape(5, 4, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(5, 64)
    out = (operand @ packed.T).reshape(5, D // 32, 4, 4, 2).permute(0, 1, 3, 2, 4).reshape(5, D)
    torch.testing.assert_close(out, p @ v)
