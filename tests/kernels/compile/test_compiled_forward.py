"""The forward pass fits every card: its kernels compile, and ask for no more memory and registers than a block may have."""

import pytest
import torch
from ahead_of_time import HEADS, TOKENS
from cards import CARDS, assert_fits

from sla2_kernels.support import unsupported_reason

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
# dtype, head_dim, precision, where the ratio comes from ("none": every block is selected, there is no linear branch)
CASES = (
    (BF16, 128, "int8", "estimated"),
    (FP16, 128, "int8", "learned"),
    (BF16, 128, "16bit", "estimated"),
    (FP16, 128, "fp8", "none"),
    (BF16, 64, "16bit", "learned"),
    (FP16, 64, "int8", "none"),
    (FP32, 128, "int8", "learned"),
    (FP32, 128, "16bit", "estimated"),
)
ODD = [card for card in CARDS if card.arch in (86, 120)]


def spill_bar(card, dtype=BF16):
    """Bytes per thread. float32: three TF32 products each. sm_90: its tiles are the fastest on the card, spilling or not."""
    if dtype == FP32:
        return float("inf")
    return 1024 if card.capability == (9, 0) else 64


def case_id(case):
    dtype, *others = case
    return "-".join(map(str, (str(dtype).removeprefix("torch."), *others)))


@pytest.mark.parametrize("case", CASES, ids=case_id)
@pytest.mark.parametrize("card", CARDS, ids=str)
def test_forward_fits(compile_for, attend, card, case):
    dtype, head_dim, precision, ratio = case
    kernels = compile_for(card).kernels
    reason = unsupported_reason("cpu", dtype, head_dim, precision, backend="triton")
    if precision == "fp8" and card.capability < (8, 9):
        assert "8.9" in reason
        with pytest.raises(ValueError, match=r"8\.9"):
            attend(*case)
        assert not kernels
        return
    assert reason is None
    attend(*case)
    names = [kernel.name for kernel in kernels]
    assert sum("_sparse_attention" in name for name in names) == 1
    assert ("_masked_sum" in names) == ("_linear_attention" in names) == (ratio != "none")
    for kernel in kernels:
        print(kernel)
        assert_fits(kernel, card, spill_bar(card, dtype))


@pytest.mark.parametrize("card", ODD, ids=str)
def test_odd_strides_and_one_block(compile_for, attend, card):
    """Integers that are 1, strides that 16 does not divide, pointers at odd elements: another specialisation of it all."""
    kernels = compile_for(card).kernels
    wide = [torch.zeros(1, TOKENS, HEADS, 129, dtype=BF16)[..., 1:] for _ in range(3)]
    attend(BF16, 128, "int8", "learned", qkv=wide, layout="BNHD", sparsity=0.99)
    one_block = [torch.zeros(1, 1, 1, 64, dtype=BF16) for _ in range(3)]
    attend(BF16, 64, "int8", "none", qkv=one_block)
    assert [kernel.name for kernel in kernels].count("_sparse_attention") == 2
    for kernel in kernels:
        print(kernel)
        assert_fits(kernel, card, 1024)  # element by element, whatever the tiles
