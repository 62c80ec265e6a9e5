"""Channels far larger than the others, and INT8: what Q and K are balanced with, and the operator's error with it."""

import pytest
import torch
from operator_inputs import attention_inputs, embedded, normal, relative_error

from sla2_kernels import select_key_blocks, sla2_attention
from sla2_kernels.kernels.pool import pools
from sla2_kernels.quantization import balance


@pytest.mark.parametrize(("tokens", "keys"), [(1, 70), (300, 1000)])
def test_factors_are_the_emulation_s_and_q_s_are_the_inverse(generator, tokens, keys):
    q, k = (normal(generator, 2, 3, count, 64) for count in (tokens, keys))
    q[..., 5] *= 30
    k[..., 9] *= 30
    k += 100 * normal(generator, 2, 3, 1, 64)
    found = pools(embedded(k), embedded(q), balance=True).balance
    rows = zip(q.double().flatten(0, 1), k.double().flatten(0, 1), strict=True)
    expected = torch.stack([balance(*row) for row in rows])
    assert torch.allclose(found[:, 0].double(), expected, rtol=1e-4)
    assert torch.allclose(found[:, 0] * found[:, 1], torch.ones(6, 64))
    assert (found[:, 0, 5] > 3 * found[:, 0, 0]).all() or tokens == 1
    assert (found[:, 0, 9] < found[:, 0, 0] / 3).all() or tokens == 1


@pytest.mark.parametrize("hard", ["zeros", "equal keys", "NaN", "infinity"])
def test_a_sample_that_says_nothing_changes_nothing(generator, hard):
    q, k = (normal(generator, 1, 1, 300, 32) for _ in range(2))
    if hard == "zeros":
        q, k = torch.zeros_like(q), torch.zeros_like(k)
    elif hard == "equal keys":
        k = k[:, :, :1].expand_as(k)
    else:
        q[:, :, 0] = k[:, :, 0] = torch.nan if hard == "NaN" else torch.inf
    assert (pools(k, q, balance=True).balance == 1).all()
    assert (balance(q[0, 0], k[0, 0]) == 1).all()


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("capability", ["8.0", "9.0", "10.0"])
@pytest.mark.parametrize("side", ["q", "k"])
def test_outliers_on_one_side_cost_no_precision(generator, monkeypatch, backend, capability, side):
    if backend == "torch" and capability != "8.0":
        pytest.skip("one emulation for all cards")
    monkeypatch.setenv("SLA2_INTERPRET_CAPABILITY", capability)
    errors = []
    for gain in (1.0, 30.0):
        inputs = attention_inputs(generator.manual_seed(1), heads=1, tokens=130, keys=420, head_dim=64)
        large, small = (inputs.q, inputs.k) if side == "q" else (inputs.k, inputs.q)
        large[..., -4:] *= gain
        small[..., -4:] /= gain
        # softmax attention alone: the linear branch sees other channels
        inputs.alpha = torch.ones(1)
        blocks = select_key_blocks(inputs.q, inputs.k, sparsity=0.5, backend="torch")
        out = sla2_attention(*inputs.tensors(), precision="int8", backend=backend, key_blocks=blocks)
        expected, _ = inputs.reference(blocks)
        errors.append(relative_error(out, expected))
    assert errors[1] < 1.15 * errors[0]
