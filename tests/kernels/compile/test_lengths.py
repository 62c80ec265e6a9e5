"""A changed length, as of a longer or a larger video, compiles nothing new: the first run of a card is the only slow one."""

import pytest
import torch
from cards import CARDS

from sla2_kernels.fitted_attention import fitted_attention, sample_rows

# tokens of what people run, Wan 2.2 at 480p, LTX-2's second stage, MiniMax H3, and a length that nothing divides
LENGTHS = (32_760, 14_080, 36_960, 8_193)


@pytest.mark.parametrize("card", [card for card in CARDS if card.arch in (86, 90)], ids=str)
def test_a_changed_length_compiles_nothing_new(compile_for, card):
    recorder, counts = compile_for(card), []
    for tokens in LENGTHS:
        q, k, v = torch.zeros(3, 1, 2, tokens, 64, dtype=torch.bfloat16)
        fitted_attention(q, k, v, rows=sample_rows(tokens, 0), sparsity=0.9, precision="int8", backend="triton")
        counts.append(len(recorder.kernels))
    assert counts[0] > 5 and counts == [counts[0]] * len(LENGTHS), [
        kernel.name for kernel in recorder.kernels[counts[0] :]
    ]
