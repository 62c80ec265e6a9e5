"""The kernels of the exchange between GPUs compile for every card, and spill nothing."""

import pytest
import torch
from cards import CARDS, assert_fits

from sla2_kernels.eight_bit_exchange import EightBitExchange
from sla2_kernels.kernels.copy_heads import copy_heads
from sla2_kernels.pool_routing import PoolRouting

SOME_CARDS = [card for card in CARDS if card.arch in (86, 90, 120)]


@pytest.mark.parametrize("card", SOME_CARDS, ids=str)
def test_rows_are_packed_and_opened_without_spilling(compile_for, card):
    kernels = compile_for(card).kernels
    q, k, v = (torch.zeros(1, 300, 4, 128, dtype=torch.bfloat16) for _ in range(3))
    exchange = EightBitExchange(q, k, v, 2, 0, PoolRouting(0.5, backend="triton"))
    exchange.opened(exchange.message(slice(0, 1)), slice(0, 1))
    names = [kernel.name for kernel in kernels]
    assert "_encode" in names and "_decode" in names
    for kernel in kernels:
        if kernel.name in ("_encode", "_decode"):
            print(kernel)
            assert_fits(kernel, card, 0)


@pytest.mark.parametrize("card", SOME_CARDS, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_heads_are_copied_by_16_bytes_and_a_changed_length_or_group_compiles_nothing_new(
    compile_for, card, dtype, head_dim
):
    recorder = compile_for(card)
    for tokens, width in ((75_600 // 48, 4), (501, 1), (8, 20)):
        q, k, v = (torch.zeros(1, tokens, 40, head_dim, dtype=dtype) for _ in range(3))
        sources = [x.unflatten(2, (2, 20)).permute(2, 1, 0, 3, 4)[1:, :, :, :width] for x in (q, k, v)]
        into = torch.zeros(1, tokens, 1, 3, width, head_dim, dtype=dtype)
        copy_heads(into, sources)
        copy_heads(into[:, :, :, 1:2], sources[:1])
    assert [kernel.name for kernel in recorder.kernels] == ["_copy"] * 2
    for kernel in recorder.kernels:
        print(kernel)
        assert_fits(kernel, card, 0)
        assert kernel.accesses == {"ld.global.v4.b32", "st.global.v4.b32"} and kernel.spilled == 0
