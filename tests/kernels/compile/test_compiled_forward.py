"""The forward pass fits every card: its kernels compile, and ask for no more memory and registers than a block may have."""

from dataclasses import replace

import pytest
import torch
from ahead_of_time import HEADS, TOKENS, TRITON
from cards import CARDS, assert_fits

from sla2_kernels.kernels.configs import fit_config
from sla2_kernels.kernels.fitted_ratio import FittedRatio
from sla2_kernels.kernels.gluon_releases import gluon_is_known
from sla2_kernels.kernels.key_block_sums import key_block_sums, largest_scores
from sla2_kernels.kernels.row_errors import row_errors
from sla2_kernels.support import unsupported_reason
from sla2_kernels.triton_backend import Sample

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
ALL = tuple(card.arch for card in CARDS)
# dtype, head_dim, precision, where the ratio comes from ("none": every block is selected, there is no linear branch), cards.
# bfloat16, which video models have, for every card; the others for those that differ (see the test of the launches)
CASES = (
    (BF16, 128, "int8", "estimated", ALL),
    (BF16, 128, "int8", "learned", ALL),
    (BF16, 128, "16bit", "estimated", ALL),
    (BF16, 64, "16bit", "learned", ALL),
    (BF16, 128, "fp8", "none", ALL),
    (BF16, 64, "int8", "none", ALL),
    (FP16, 128, "int8", "learned", (86,)),
    (FP16, 128, "fp8", "none", (120,)),
    (FP32, 128, "int8", "learned", (86, 90, 100)),
    (FP32, 128, "16bit", "estimated", (86, 90, 100)),
)
SPILLING = {"_int8_sparse_attention": 384, "_product_of_halves": 128}
ODD = [card for card in CARDS if card.arch in (86, 120)]


def spill_bar(card, dtype=BF16, kernel=""):
    """Bytes per thread. float32: three TF32 products each. sm_90, the INT8 loop, the scores, and pack with h_j in INT8 (float16
    becomes bfloat16 in it): their tiles are the fastest on the card, spilling or not."""
    if dtype == FP32:
        return float("inf")
    if kernel == "_int8_pack":
        return 1024 if dtype == FP16 else 128  # Triton 3.3: 656
    if kernel in SPILLING:
        return SPILLING[kernel]
    return 1024 if card.capability == (9, 0) else 64


def case_id(case):
    return "-".join(str(part).removeprefix("torch.") for part in case)


def compiled(card, dtype):
    """The cases of a dtype that are compiled for a card."""
    return [case for *case, archs in CASES if card.arch in archs and case[0] == dtype]


@pytest.mark.parametrize(
    ("card", "case"),
    [
        pytest.param(card, case, id=f"{card}-{case_id(case)}")
        for *case, archs in CASES
        for card in CARDS
        if card.arch in archs
    ],
)
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
    linear, hopper = ratio != "none", "_hopper_sparse_attention" in names
    # the loop for Hopper takes the linear branch along, and has its sums in FP8 where V is
    fp8_sums = linear and hopper and precision == "int8"
    # the INT8 loop takes the linear branch along too, in 16 bit, where Triton reshapes in registers
    takes_along = hopper or ("_int8_sparse_attention" in names and dtype != FP32 and TRITON >= (3, 3))
    assert ("_linear_attention" in names) == (linear and not takes_along)
    assert ("_int8_sparse_attention" in names) == (precision == "int8" and card.capability[0] in (8, 12))
    # cards with mma.sync have them in INT8
    int8_sums = linear and "_int8_sparse_attention" in names
    assert ("_masked_sum" in names) == (linear and not fp8_sums and not int8_sums)
    assert ("_hopper_masked_sum" in names) == ("_weighted_mask" in names) == fp8_sums
    product = "_mma_masked_sum" if gluon_is_known() else "_int8_masked_sum"
    assert (product in names) == ("_int8_weighted_mask" in names) == int8_sums
    for kernel in kernels:
        print(kernel)
        assert_fits(kernel, card, spill_bar(card, dtype, kernel.name))
        if kernel.name == "_int8_pack" and head_dim == 128:
            # K's INT8 in 8 bytes a thread: in 16, K itself would come in two loads that each take half of every 32 bytes
            assert any(access.startswith("st.global") and ".v2." in access for access in kernel.accesses)
        if kernel.name == "_int8_sparse_attention":
            # two programs at a time
            assert kernel.shared <= 49 * 1024 or card.shared_kb > 99 or TRITON < (3, 3), kernel
            # L2 is told what is read or written for the last time
            assert any("evict_first" in access for access in kernel.accesses)


@pytest.mark.skipif(TRITON < (3, 3), reason="Triton 3.2 reshapes by way of shared memory")
def test_probabilities_stay_in_their_warp_with_64_queries_per_selection(compile_for, attend):
    """In INT8 on RTX 40: where the warps share out columns P goes through shared memory, and the loop takes twice as long."""
    card = next(card for card in CARDS if card.arch == 89)
    compiled = compile_for(card, only="_int8_sparse_attention")
    attend(BF16, 128, "int8", "learned", query_block=64)
    (kernel,) = compiled.kernels
    assert_fits(kernel, card, spill_bar(card))
    assert not [access for access in kernel.accesses if access.startswith("st.shared") and access.endswith("b8")]


def launched(compile_for, attend, card, cases):
    recorder = compile_for(card, compiling=False)
    for case in cases:
        if case[2] != "fp8" or card.capability >= (8, 9):
            attend(*case)
    return recorder.launches


def as_bfloat16(launch):
    """A launch of float16 tensors as that of bfloat16 ones."""
    dtypes = dict.fromkeys("bfloat16" if dtype == "float16" else dtype for dtype in launch.dtypes)
    return replace(launch, dtypes=tuple(sorted(dtypes)))


@pytest.mark.parametrize("card", CARDS, ids=str)
def test_float16_launches_what_bfloat16_does(compile_for, attend, card):
    """So that what fits in the one fits in the other: both take 16 bits."""
    bfloat16 = compiled(card, BF16)
    expected = {as_bfloat16(launch) for launch in launched(compile_for, attend, card, bfloat16)}
    float16 = launched(compile_for, attend, card, [(FP16, *others) for _, *others in bfloat16])
    assert any("float16" in launch.dtypes for launch in float16)
    assert {as_bfloat16(launch) for launch in float16} <= expected


@pytest.mark.parametrize("card", CARDS, ids=str)
def test_float32_launches_what_is_compiled_for_a_card_with_no_more_memory(compile_for, attend, card):
    smaller = [other for other in CARDS if other.shared_kb <= card.shared_kb]
    known = set().union(*(launched(compile_for, attend, other, compiled(other, FP32)) for other in smaller))
    cases = {case_id(case): case for other in CARDS for case in compiled(other, FP32)}
    found = launched(compile_for, attend, card, cases.values())
    assert found and found <= known


@pytest.mark.parametrize(
    ("precision", "arch"), [("int8", 86), ("int8", 100), ("16bit", 86), ("16bit", 90), ("fp8", 89)]
)
def test_loops_with_64_query_tokens_per_selection_fit(compile_for, attend, precision, arch):
    """Their tiles are others; Hopper's own loop is compiled in test_compiled_hopper_loop.py."""
    (card,) = (card for card in CARDS if card.arch == arch)
    recorder = compile_for(card, only="_sparse_attention")
    attend(BF16, 128, precision, "learned", query_block=64)
    (loop,) = recorder.kernels
    assert {"TILE": 64, "QUERY_BLOCK": 64}.items() <= dict(loop.constants).items()
    print(loop)
    assert_fits(loop, card, spill_bar(card, BF16, loop.name))


@pytest.mark.parametrize("precision", ["16bit", "int8", "fp8"])
@pytest.mark.parametrize("card", CARDS, ids=str)
def test_without_the_linear_branch_it_launches_what_a_call_with_every_block_selected_does(
    compile_for, attend, card, precision
):
    """Nothing of the linear branch, not even its mask; these loops, and those with a ratio, are compiled above."""
    if precision == "fp8" and card.capability < (8, 9):
        pytest.skip(f"{card} has no FP8")

    def launches(ratio, **options):
        recorder = compile_for(card, compiling=False)
        attend(BF16, 128, precision, ratio, **options)
        return recorder.launches

    assert launches("estimated", linear_branch=False) == launches("none")


@pytest.mark.parametrize("card", ODD, ids=str)
def test_odd_strides_and_one_block(compile_for, attend, card):
    """Integers that are 1, strides that 16 does not divide, pointers at odd elements: another specialisation of it all."""
    kernels = compile_for(card).kernels
    wide = [torch.zeros(1, TOKENS, HEADS, 129, dtype=BF16)[..., 1:] for _ in range(3)]
    attend(BF16, 128, "int8", "learned", qkv=wide, layout="BNHD", sparsity=0.99)
    one_block = [torch.zeros(1, 1, 1, 64, dtype=BF16) for _ in range(3)]
    attend(BF16, 64, "int8", "none", qkv=one_block)
    assert [kernel.name for kernel in kernels].count("_int8_sparse_attention") == 2
    for kernel in kernels:
        print(kernel)
        assert_fits(kernel, card, 1024)  # element by element, whatever the tiles


def of_a_fitted_ratio(card, dtype):
    """Launches what fits a ratio to the rows of a sample."""
    q, k, v = torch.zeros(3, 1, HEADS, TOKENS, 128, dtype=dtype)
    unselected = torch.ones(HEADS, TOKENS // 128, TOKENS // 64, dtype=dtype)
    rows, dense = torch.zeros(32, dtype=torch.int32), torch.zeros(1, HEADS, 32, 128)
    sample = Sample(rows, 24, dense, torch.zeros(1, HEADS))
    fitted = FittedRatio(sample, torch.zeros(HEADS, TOKENS // 128), 128)
    config = fit_config(card.capability, q.element_size())
    fitted.attend(q, k, v, unselected, scale_log2=0.1, config=config)
    sums = torch.zeros(HEADS, TOKENS // 128, 129 * 128, dtype=dtype)
    fitted.fit(q, sums, slice(0, HEADS), order=32 if card.capability == (9, 0) else 64)
    row_errors(q, dense, rows, 24)
    return ["_row_sums", "_row_products", "_ratio", "_row_errors"]


def by_key_block(card, dtype):
    """Launches the sums by key block."""
    head_dim = 64 if dtype == FP16 else 128
    q, k, v = torch.zeros(3, HEADS, TOKENS, head_dim, dtype=dtype)
    mass, value = torch.zeros(HEADS, TOKENS, TOKENS // 64), torch.zeros(TOKENS // 64, HEADS, TOKENS, head_dim)
    key_block_sums(q, k, v, largest_scores(q, k, 0.1), 0.1, mass, value)
    return ["_largest_scores", "_key_block_sums"]


# the second dtype for cards that differ, as in CASES
BESIDE_THE_CALL = (
    (of_a_fitted_ratio, BF16, ALL),
    (of_a_fitted_ratio, FP32, (86, 90, 100)),
    (by_key_block, BF16, ALL),
    (by_key_block, FP16, (86, 90, 100, 120)),
)


@pytest.mark.parametrize(
    ("launch", "dtype", "card"),
    [
        pytest.param(launch, dtype, card, id=f"{launch.__name__}-{card}-{dtype}")
        for launch, dtype, archs in BESIDE_THE_CALL
        for card in CARDS
        if card.arch in archs
    ],
)
def test_kernels_beside_the_call_fit(compile_for, launch, dtype, card):
    kernels = compile_for(card).kernels
    assert launch(card, dtype) == [kernel.name for kernel in kernels]
    for kernel in kernels:
        print(kernel)
        assert_fits(kernel, card, 64)


@pytest.mark.parametrize(("launch", "dtype", "archs"), BESIDE_THE_CALL[1::2], ids=["float32", "float16"])
def test_other_cards_launch_beside_the_call_what_is_compiled_for_the_one_with_least_memory(
    compile_for, launch, dtype, archs
):
    def launches(card):
        recorder = compile_for(card, compiling=False)
        launch(card, dtype)
        return recorder.launches

    (least,) = (card for card in CARDS if card.arch == 86)
    expected = launches(least)
    assert expected and all(launches(card) == expected for card in CARDS if card.arch not in archs)
