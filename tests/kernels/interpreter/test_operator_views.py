"""A view of any stride gives, bit for bit, what its contiguous copy gives; the output is contiguous in its layout."""

import pytest
import torch
from operator_inputs import attention_inputs, embedded, normal

from sla2_kernels import select_key_blocks, sla2_attention
from sla2_kernels.fitted_attention import fitted_attention, sample_rows

pytestmark = pytest.mark.usefixtures("wide_tiles")

PRECISIONS = ("16bit", "int8", "fp8")
OPTIONS = {"sparsity": 0.5, "backend": "triton", "return_alpha": True}


def assert_same_as_contiguous(views, precision, **options):
    options = {**OPTIONS, **options, "precision": precision}
    out, ratio = sla2_attention(*views, **options)
    expected, expected_ratio = sla2_attention(*(x.contiguous() for x in views), **options)
    assert out.is_contiguous() and torch.isfinite(out).all()
    assert torch.equal(out, expected) and torch.equal(ratio, expected_ratio)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", ["BHND", "BNHD"])
def test_views_between_nan(generator, layout, precision):
    inputs = attention_inputs(generator, batch=2, heads=1, tokens=65, keys=130, dtype=torch.float16)
    views = [x.transpose(1, 2) if layout == "BNHD" else x for x in (inputs.q, inputs.k, inputs.v)]
    assert_same_as_contiguous([embedded(x) for x in views], precision, layout=layout)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_slices_of_one_fused_projection(generator, precision):
    fused = normal(generator, 1, 130, 3 * 2 * 64 + 5, dtype=torch.float16)
    views = [fused[..., i * 128 : (i + 1) * 128].unflatten(-1, (2, 64)) for i in range(3)]
    assert_same_as_contiguous(views, precision, layout="BNHD")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_expanded_heads_and_batch(generator, precision):
    q = normal(generator, 2, 2, 65, 64)
    k, v = (normal(generator, 1, 1, 130, 64).expand(2, 2, -1, -1) for _ in range(2))
    assert_same_as_contiguous([q, k, v], precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_features_outermost_and_tokens_reversed_in_memory(generator, precision):
    q, k, v = (normal(generator, 64, 2, 150, 1).permute(3, 1, 2, 0) for _ in range(3))
    assert q.stride(-1) == 300
    assert_same_as_contiguous([q, k, v], precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_both_layouts_agree(generator, precision):
    inputs = attention_inputs(generator, batch=2, heads=2, tokens=65, keys=130, proj="per head", knots=2)
    out, ratio = sla2_attention(*inputs.tensors(), **OPTIONS, precision=precision)
    swapped = [x.transpose(1, 2) for x in inputs.tensors()[:3]]
    other, other_ratio = sla2_attention(*swapped, *inputs.tensors()[3:], **OPTIONS, precision=precision, layout="BNHD")
    assert other.is_contiguous() and torch.equal(other.transpose(1, 2), out) and torch.equal(other_ratio, ratio)


@pytest.mark.parametrize(("precision", "layout"), [("fp8", "BHND"), ("int8", "BNHD")])
def test_rows_beside_those_of_q_are_left_alone(generator, monkeypatch, precision, layout):
    inputs = attention_inputs(generator, batch=2, heads=1, tokens=65, keys=130, head_dim=32)
    q, k, v = (x.transpose(1, 2) if layout == "BNHD" else x for x in (inputs.q, inputs.k, inputs.v))
    options = {"sparsity": 0.5, "backend": "triton", "precision": precision, "layout": layout}

    def attend(**more):
        if precision == "int8":
            return fitted_attention(q, k, v, rows=sample_rows(65, 0), **options, **more).out
        return sla2_attention(q, k, v, **options, **more)

    expected, empty = attend(), torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **given: empty(*size, **given).fill_(7))
    out = attend(room=(3, 70))
    front, own, back = out.split([3, 65, 70], dim=1 if layout == "BNHD" else 2)
    assert out.is_contiguous() and torch.equal(own, expected) and (front == 7).all() and (back == 7).all()


def test_selection_of_a_view(generator):
    inputs = attention_inputs(generator, batch=2, heads=2, tokens=130, keys=300)
    expected = select_key_blocks(inputs.q, inputs.k, sparsity=0.5, backend="triton")
    q, k = (embedded(x.transpose(1, 2)) for x in (inputs.q, inputs.k))
    assert torch.equal(select_key_blocks(q, k, sparsity=0.5, layout="BNHD", backend="triton"), expected)


def test_inputs_are_left_as_they_were(generator):
    inputs = attention_inputs(generator, tokens=130, proj="shared", knots=2)
    tensors = [*inputs.tensors(), select_key_blocks(inputs.q, inputs.k, sparsity=0.5).flip(-1)]
    before = [x.clone() for x in tensors]
    sla2_attention(*tensors[:6], key_blocks=tensors[6], backend="triton")
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))
