"""benchmarks/int8_outliers.py: gains, rotation and balancing change no logit, and INT8 loses where channels are outliers."""

import pytest
import torch

from benchmarks.int8_outliers import CHANGES, errors, hadamard, with_gains
from benchmarks.synthetic import SyntheticLayer


@pytest.fixture(scope="module")
def qkv():
    return SyntheticLayer(0, head_dim=32, grid=(2, 16, 16)).sample(1)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_no_logit_changes(qkv, change):
    q, k = (x[0, 0].double().unflatten(0, (-1, 64)) for x in qkv[:2])
    new_q, new_k = change(q, k)
    torch.testing.assert_close(new_q.flatten(0, 1) @ new_k.flatten(0, 1).T, q.flatten(0, 1) @ k.flatten(0, 1).T)
    assert torch.allclose(hadamard(32) @ hadamard(32).T, torch.eye(32), atol=1e-6)


@pytest.mark.parametrize("side", ["q", "k"])
def test_outliers_cost_int8_a_multiple_and_balancing_undoes_it(qkv, side):
    q, k, v = qkv
    plain, hard = errors(q, k, v), errors(*with_gains(q, k, side, 8, 10.0), v)
    assert hard["int8 plain"] > 2 * plain["int8 plain"]
    assert hard["int8"] < 1.1 * plain["int8"] and hard["int8 rotated"] < hard["int8 plain"]
    assert hard["16bit"] < 1.1 * plain["16bit"] and hard["fp8"] < 1.1 * plain["fp8"]
