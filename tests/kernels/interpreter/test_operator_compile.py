"""torch.compile around the Triton backend: still one operator, forward and backward."""

import pytest
import torch
from operator_inputs import attention_inputs

from sla2_kernels import sla2_attention

pytestmark = pytest.mark.usefixtures("wide_tiles")


def test_no_graph_break_and_the_same_bits(generator):
    inputs = attention_inputs(generator, heads=1, tokens=65, keys=130, knots=2)

    def layer(q, k, v, alpha):
        return sla2_attention(q, k, v, alpha=alpha, sparsity=0.5, backend="triton") * 2

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, layer):
        leaves = [x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.alpha)]
        out = function(*leaves)
        out.square().sum().backward()
        results.append([out, *(x.grad for x in leaves)])
    torch._dynamo.reset()
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
