"""The kernels of the exchange between GPUs compile for every card, and spill nothing."""

import pytest
import torch
from cards import CARDS, assert_fits

from sla2_kernels.eight_bit_exchange import EightBitExchange
from sla2_kernels.pool_routing import PoolRouting


@pytest.mark.parametrize("card", [card for card in CARDS if card.arch in (86, 90, 120)], ids=str)
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
