"""Without the linear branch: softmax over the selected keys in every format, and no kernel of the linear branch runs."""

import pytest
import torch
from operator_inputs import attention_inputs, embedded, normal, relative_error

from sla2_kernels import select_key_blocks, sla2_attention, triton_backend, triton_backward
from sla2_kernels.reference import sla2_reference
from sla2_kernels.sla_v1 import sla_attention

# (precision, compute capability, dtype, layout): highest relative error
BARS = {
    ("16bit", "8.9", torch.float32, "BNHD"): 1e-5,
    ("16bit", "8.0", torch.float16, "BHND"): 1e-3,
    ("int8", "8.0", torch.float16, "BNHD"): 4e-2,
    ("int8", "9.0", torch.float32, "BHND"): 6e-2,
    ("int8", "9.0", torch.float16, "BNHD"): 6e-2,
    ("fp8", "8.9", torch.float16, "BHND"): 1e-1,
}


@pytest.fixture(autouse=True)
def no_linear_branch(monkeypatch):
    def never(*_, **__):
        raise AssertionError("the linear branch is computed")

    for name in ("masked_sum", "linear_attention", "unselected_mass", "unselected_mask"):
        monkeypatch.setattr(triton_backend, name, never)
    for name in ("masked_sum", "linear_queries", "linear_keys", "unselected_mask", "pack"):
        monkeypatch.setattr(triton_backward, name, never)


@pytest.mark.parametrize(("precision", "capability", "dtype", "layout"), list(BARS))
def test_error_stays_below_the_bar(generator, monkeypatch, precision, capability, dtype, layout):
    monkeypatch.setenv("SLA2_INTERPRET_CAPABILITY", capability)
    inputs = attention_inputs(generator, heads=1, batch=2, tokens=141, keys=289, dtype=dtype, proj="shared")
    given = [embedded(x if layout == "BHND" else x.transpose(1, 2)) for x in inputs.tensors()[:3]]
    options = {"precision": precision, "layout": layout, "backend": "triton", "return_alpha": True}
    projections = {"proj_q": inputs.proj_q, "proj_k": inputs.proj_k}
    out, ratio = sla_attention(*given, None, sparsity=0.6, **projections, **options)
    blocks = select_key_blocks(*given[:2], **projections, sparsity=0.6, layout=layout, backend="triton")
    expected, _ = sla2_reference(*inputs.tensors()[:3], key_blocks=blocks, linear_branch=False)
    assert out.is_contiguous() and out.dtype == dtype and (ratio == 1).all()
    heads_first = out if layout == "BHND" else out.transpose(1, 2)
    assert relative_error(heads_first, expected) < BARS[precision, capability, dtype, layout]
    if capability == "8.0":  # a selection that is handed in needs no mask either
        assert torch.equal(sla_attention(*given, None, key_blocks=blocks.flip(-1), **options)[0], out)


@pytest.mark.parametrize(("precision", "dtype", "bar"), [("int8", torch.float32, 1e-5), ("16bit", torch.float16, 1e-3)])
def test_gradients(generator, precision, dtype, bar):
    inputs = attention_inputs(generator, heads=1, tokens=141, keys=200, head_dim=32, dtype=dtype)
    blocks = select_key_blocks(inputs.q, inputs.k, sparsity=0.5, backend="torch")
    grad = normal(generator, *inputs.q.shape, dtype=dtype)
    leaves = ([x.detach().to(kind).requires_grad_() for x in inputs.tensors()[:3]] for kind in (dtype, torch.float64))
    found, expected = leaves
    options = {"key_blocks": blocks, "precision": precision, "backend": "triton", "linear_branch": False}
    sla2_attention(*found, **options).backward(grad)
    sla2_reference(*expected, key_blocks=blocks, linear_branch=False)[0].backward(grad.double())
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours.grad, theirs.grad) < bar
