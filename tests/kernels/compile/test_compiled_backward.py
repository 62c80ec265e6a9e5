"""The backward pass fits every card."""

import pytest
import torch
from ahead_of_time import HEADS, TOKENS, TRITON
from cards import CARDS, assert_fits

from sla2_kernels import K_BLOCK, Q_BLOCK
from sla2_kernels.kernels.gluon_releases import GLUON_RELEASES

BACKWARD = {"_linear_queries", "_linear_sums", "_linear_keys", "_query_gradient", "_key_gradient"}
WALKS = {"_query_gradient": "_hopper_query_gradient", "_key_gradient": "_hopper_key_gradient"}
LINEAR = {"_hopper_linear_sums", "_hopper_linear_queries", "_hopper_linear_keys", "_hopper_product"}

SPILL = {torch.bfloat16: 256, torch.float16: 512, torch.float32: float("inf")}
# float16 sums in float32; that and float32 itself are compiled for fewer cards, to save minutes
CASES = [
    pytest.param(card, dtype, head_dim, id=f"{card}-{str(dtype).removeprefix('torch.')}-{head_dim}")
    for dtype, head_dim, archs in (
        (torch.bfloat16, 128, {card.arch for card in CARDS}),
        (torch.float16, 64, {86}),
        (torch.float32, 128, {86}),
    )
    for card in CARDS
    if card.arch in archs
]


def run(attend, dtype, head_dim, query_block=Q_BLOCK):
    """The operator's output for zeros that need gradients."""
    qkv = [torch.zeros(1, HEADS, TOKENS, head_dim, dtype=dtype, requires_grad=True) for _ in range(3)]
    # nothing is computed here, so the selection that the backward pass sorts has to be given
    blocks = torch.arange(TOKENS // K_BLOCK // 2).expand(1, HEADS, TOKENS // query_block, -1).contiguous()
    return attend(dtype, head_dim, "16bit", "learned", qkv=qkv, key_blocks=blocks, query_block=query_block)


def expected_kernels(card, dtype, head_dim):
    if card.arch != 90 or dtype == torch.float32 or head_dim != 128 or TRITON[:2] not in GLUON_RELEASES:
        return BACKWARD
    # float16's sums are in float32, which the kernels of the linear branch in Gluon do not take
    return {*WALKS.values(), *(LINEAR if dtype == torch.bfloat16 else BACKWARD - WALKS.keys())}


@pytest.mark.parametrize("card, dtype, head_dim", CASES)
def test_backward_fits(compile_for, attend, card, dtype, head_dim):
    recorder = compile_for(card, compiling=False)  # the forward pass has tests of its own
    out = run(attend, dtype, head_dim)
    recorder.compiling = True
    out.backward(torch.zeros_like(out))
    names = {kernel.name for kernel in recorder.kernels}
    assert names >= expected_kernels(card, dtype, head_dim)
    for kernel in recorder.kernels:
        print(kernel)
        assert_fits(kernel, card, SPILL[dtype])


@pytest.mark.parametrize("arch", [86, 90, 100])
def test_tiles_with_64_query_tokens_per_selection_fit(compile_for, attend, arch):
    """Hopper's own, and the walks whose tiles are others then; the rest are compiled above with another constant."""
    on_hopper = arch == 90 and TRITON[:2] in GLUON_RELEASES
    (card,) = (card for card in CARDS if card.arch == arch)
    recorder = compile_for(card, compiling=False, only="_hopper_" if on_hopper else "_gradient")
    out = run(attend, torch.bfloat16, 128, query_block=64)
    recorder.compiling = True
    out.backward(torch.zeros_like(out))
    of_queries = [kernel for kernel in recorder.kernels if {("QUERY_BLOCK", 64), ("ROWS", 64)} & set(kernel.constants)]
    assert len(of_queries) == (3 if on_hopper else 2)
    for kernel in recorder.kernels:
        print(kernel)
        assert_fits(kernel, card, SPILL[torch.bfloat16])


@pytest.mark.skipif(TRITON[:2] not in GLUON_RELEASES, reason="Hopper has Triton's walks alone: compiled above")
def test_a_gradient_that_tma_does_not_copy_takes_triton_s_walks_on_hopper(compile_for, attend):
    card = next(card for card in CARDS if card.arch == 90)
    recorder = compile_for(card, compiling=False)
    out = run(attend, torch.bfloat16, 128)
    recorder.compiling = True
    out.backward(torch.zeros(()).to(out).expand(out.shape))
    assert {kernel.name for kernel in recorder.kernels} >= BACKWARD
    for kernel in recorder.kernels:
        assert_fits(kernel, card, 1024)  # Triton 3.6: 632


@pytest.mark.parametrize(
    ("dtype", "head_dim", "archs"),
    [(torch.float16, 64, (80, 89, 120)), (torch.float32, 128, (80, 89, 90, 100, 120))],
    ids=["float16", "float32"],
)
def test_other_cards_launch_what_is_compiled_for_the_one_with_least_memory(compile_for, attend, dtype, head_dim, archs):
    def launches(arch):
        (card,) = (card for card in CARDS if card.arch == arch)
        recorder = compile_for(card, compiling=False)
        out = run(attend, dtype, head_dim)
        out.backward(torch.zeros_like(out))
        return {launch for launch in recorder.launches if launch.name in BACKWARD}

    expected = launches(86)
    assert len(expected) >= len(BACKWARD)
    for arch in archs:
        assert launches(arch) == expected
