"""linear_branch=False is softmax attention over the selected key blocks, and nothing of the linear branch is computed."""

import pytest
import torch
from operator_inputs import attention_inputs, embedded, normal, relative_error

from sla2_kernels import select_key_blocks, sla2_attention, torch_backend
from sla2_kernels.reference import sla2_reference
from sla2_kernels.sla_v1 import sla_attention
from sla2_kernels.video_attention import video_attention

BARS = {
    ("16bit", torch.float64): 1e-12,
    ("16bit", torch.float32): 2e-6,
    ("16bit", torch.float16): 1e-3,
    ("16bit", torch.bfloat16): 5e-3,
    ("int8", torch.bfloat16): 6e-2,
    ("fp8", torch.float16): 1e-1,
}


def no_linear_branch(*_):
    raise AssertionError("the linear branch is computed")


@pytest.mark.parametrize("layout", ["BHND", "BNHD"])
@pytest.mark.parametrize(("precision", "dtype"), list(BARS))
def test_error_stays_below_the_bar(generator, precision, dtype, layout):
    inputs = attention_inputs(generator, batch=2, tokens=301, keys=421, dtype=dtype, proj="per head", knots=None)
    blocks = select_key_blocks(*inputs.tensors()[:2], *inputs.tensors()[3:5], sparsity=0.6)
    expected, ones = sla2_reference(*inputs.tensors()[:3], key_blocks=blocks, linear_branch=False)
    given = [embedded(x if layout == "BHND" else x.transpose(1, 2)) for x in inputs.tensors()[:3]]
    options = {"sparsity": 0.6, "precision": precision, "layout": layout, "backend": "torch", "linear_branch": False}
    out, ratio = sla2_attention(*given, inputs.proj_q, inputs.proj_k, **options, return_alpha=True)
    assert out.is_contiguous() and out.dtype == dtype
    out = out if layout == "BHND" else out.transpose(1, 2)
    assert relative_error(out, expected) < BARS[precision, dtype]
    assert ratio.shape == (2, 2, 301) and (ratio == 1).all() and (ones == 1).all()


@pytest.mark.parametrize(("tokens", "keys", "sparsity"), [(1, 130, 0.5), (129, 300, 0.5), (300, 200, 0.7)])
def test_float64_gradients_are_exact(generator, tokens, keys, sparsity):
    inputs = attention_inputs(generator, tokens=tokens, keys=keys, head_dim=16, dtype=torch.float64)
    blocks, weight = select_key_blocks(inputs.q, inputs.k, sparsity=sparsity), normal(generator, *inputs.q.shape)
    found, expected = ([x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)] for _ in range(2))
    out = sla2_attention(*found, sparsity=sparsity, precision="16bit", linear_branch=False)
    (out * weight).sum().backward()
    out, _ = sla2_reference(*expected, key_blocks=blocks, linear_branch=False)
    (out * weight).sum().backward()
    assert all(relative_error(x.grad, y.grad) < 1e-10 for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("method", ["top-k only", "sla"])
def test_neither_top_k_only_nor_sla_computes_it(generator, monkeypatch, method):
    """They mix nothing in: top-k only has O_s alone, SLA v1 a linear branch of its own."""
    monkeypatch.setattr(torch_backend, "_linear_sums", no_linear_branch)
    monkeypatch.setattr(torch_backend, "linear_parts", no_linear_branch)
    inputs = attention_inputs(generator, tokens=300, head_dim=16)
    q, k, v = (x.requires_grad_() for x in inputs.tensors()[:3])
    proj_l = (torch.eye(16), torch.zeros(16)) if method == "sla" else None
    out = video_attention(q, k, v, sparsity=0.6, method=method, proj_l=proj_l, precision="16bit")
    assert torch.equal(out, sla_attention(q, k, v, proj_l, sparsity=0.6, precision="16bit"))
    out.square().sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v))


def test_a_ratio_has_nothing_to_mix(generator):
    inputs = attention_inputs(generator, tokens=130)
    with pytest.raises(ValueError, match="alpha mixes the linear branch in: leave it out where linear_branch is False"):
        sla2_attention(*inputs.tensors(), linear_branch=False)


def test_torch_compile_sees_one_operator(generator):
    inputs = attention_inputs(generator, tokens=130, keys=300)
    leaves = [x.clone().requires_grad_() for x in inputs.tensors()[:3]]

    def layer(q, k, v):
        return sla2_attention(q, k, v, sparsity=0.5, linear_branch=False)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = [(out, *torch.autograd.grad(out.sum(), leaves)) for out in (compiled(*leaves), layer(*leaves))]
    torch._dynamo.reset()
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
