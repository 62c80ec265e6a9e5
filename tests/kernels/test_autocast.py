"""Autocast changes nothing: the operator computes as its arguments say, whatever dtype autocast has."""

import pytest
import torch
from operator_inputs import attention_inputs

from sla2_kernels import select_key_blocks, sla2_attention
from sla2_kernels.forced_blocks import select_with_forced_blocks
from sla2_kernels.video_attention import video_attention

HALVES = torch.float16, torch.bfloat16
CALLS = {
    "BHND": lambda q, k, v, **_: sla2_attention(q, k, v, sparsity=0.5),
    "BNHD": lambda q, k, v, **_: sla2_attention(*(t.transpose(1, 2) for t in (q, k, v)), sparsity=0.5, layout="BNHD"),
    "alpha": lambda q, k, v, **_: sla2_attention(q, k, v, alpha=torch.full((2, 3), 0.5, dtype=q.dtype), sparsity=0.5),
    "selection": lambda q, k, v, **_: select_key_blocks(q, k, torch.eye(16), sparsity=0.5),
    "forced blocks": lambda q, k, v, **_: select_with_forced_blocks(q, k, torch.eye(16), sparsity=0.5, front=10),
    "SLA v1": lambda q, k, v, dense: video_attention(
        q, k, v, method="sla", proj_l=(torch.eye(16), torch.ones(16)), sparsity=0.5
    ),
    "exact rows": lambda q, k, v, dense: video_attention(q, k, v, front=10, back=5, sparsity=0.5, dense=dense),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("autocast", HALVES)
def test_any_dtype_under_any_other(generator, name, dtype, autocast):
    q, k, v = attention_inputs(generator, tokens=200, head_dim=16, dtype=dtype).tensors()[:3]

    def dense(q, k, v):
        # what dense attention does is autocast's own affair; here it is to be the same
        with torch.autocast("cpu", enabled=False):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    expected = CALLS[name](q, k, v, dense=dense)
    with torch.autocast("cpu", dtype=autocast):
        found = CALLS[name](q, k, v, dense=dense)
    assert found.dtype == expected.dtype and torch.equal(found, expected)


@pytest.mark.parametrize("dtype", HALVES)
def test_exact_rows_in_autocasts_dtype_join_the_others(generator, dtype):
    """torch's dense attention computes in autocast's dtype."""
    other = HALVES[dtype == torch.float16]
    q, k, v = attention_inputs(generator, tokens=200, head_dim=16, dtype=dtype).tensors()[:3]
    with torch.autocast("cpu", dtype=other):
        out = video_attention(q, k, v, front=10, sparsity=0.5)
    assert out.dtype == dtype and torch.isfinite(out).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_gradients(generator, dtype):
    inputs = attention_inputs(generator, tokens=130, keys=200, head_dim=16, dtype=dtype, knots=2)
    grads = []
    for enabled in (False, True):
        leaves = [x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.alpha)]
        with torch.autocast("cpu", dtype=HALVES[dtype == torch.float16], enabled=enabled):
            out = sla2_attention(*leaves[:3], alpha=leaves[3], sparsity=0.5, layout="BHND")
            out.backward(torch.ones_like(out))
        grads.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))
