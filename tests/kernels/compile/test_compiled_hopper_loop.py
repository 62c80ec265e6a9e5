"""The kernels in Gluon compile and fit for sm_90 where the installed Triton has the Gluon they were written with."""

import pytest
import torch
import triton
from ahead_of_time import HEADS, TOKENS, TRITON
from cards import CARDS, assert_fits

from sla2_kernels.kernels.configs import loop_formats
from sla2_kernels.kernels.gluon_releases import GLUON_RELEASES
from sla2_kernels.kernels.hopper import takes_hopper_loop

if TRITON[:2] not in GLUON_RELEASES:
    pytest.skip(f"Triton {triton.__version__} has no Gluon for Hopper as it is used here", allow_module_level=True)

HOPPER = next(card for card in CARDS if card.arch == 90)
OTHERS = [card for card in CARDS if card is not HOPPER]
WIDE = torch.zeros(1, HEADS, TOKENS, 272, dtype=torch.bfloat16)
Q = WIDE[..., :128]


def taken(q, k, v, precision="int8", capability=(9, 0), query_block=128):
    return takes_hopper_loop(capability, *loop_formats(precision, capability), q, k, v, query_block)


def test_no_other_card_and_no_other_format_takes_it():
    assert taken(Q, Q, Q) and taken(Q, Q, Q, "16bit") and taken(Q, Q, Q, query_block=64)
    assert not taken(Q, Q, Q, "16bit", query_block=64)
    assert not taken(Q, Q, Q, "fp8")
    assert not any(taken(Q, Q, Q, capability=card.capability) for card in OTHERS)


@pytest.mark.parametrize(
    "odd",
    [WIDE[..., :256:2], WIDE[..., 1:129], Q.float(), Q[..., :64], Q[:, :1].expand(1, HEADS, TOKENS, 128)],
    ids=["strided channels", "unaligned", "float32", "head_dim 64", "broadcast"],
)
def test_tensors_that_tma_does_not_copy_take_triton_s_loop(odd):
    assert not taken(odd, odd, odd)


def test_packed_keys_are_copied_whatever_k_is():
    odd = WIDE[..., 1:129]
    assert taken(Q, odd, odd) and not taken(Q, odd, Q, "16bit") and not taken(Q, Q, odd, "16bit")


@pytest.mark.parametrize("ratio", ["none", "learned", "estimated"])
@pytest.mark.parametrize(("precision", "query_block"), [("int8", 128), ("int8", 64), ("16bit", 128)])
def test_it_fits(compile_for, attend, precision, query_block, ratio):
    kernels = compile_for(HOPPER).kernels
    attend(torch.bfloat16, 128, precision, ratio, query_block=query_block)
    (loop,) = (kernel for kernel in kernels if "sparse_attention" in kernel.name)
    assert loop.name == "_hopper_sparse_attention"
    # at the ends of a tile, outside the loop over pairs
    assert_fits(loop, HOPPER, spill=128)
    sums = [kernel for kernel in kernels if kernel.name == "_hopper_masked_sum"]
    assert len(sums) == (precision == "int8" and ratio != "none")
    for kernel in sums:
        assert_fits(kernel, HOPPER, spill=0)
    print(loop, *sums, sep="\n")
