"""The torch backend against the float64 definition; chunks, views and autocast change nothing."""

import pytest
import torch
from operator_inputs import attention_inputs, embedded, relative_error

from sla2_kernels import select_key_blocks, sla2_attention, torch_backend

BARS = {
    ("16bit", torch.float64): 1e-12,
    ("16bit", torch.float32): 2e-6,
    ("16bit", torch.float16): 1e-3,
    ("16bit", torch.bfloat16): 5e-3,
    ("int8", torch.float32): 6e-2,
    ("int8", torch.bfloat16): 6e-2,
    ("fp8", torch.float32): 1e-1,
    ("fp8", torch.float16): 1e-1,
}


def route(inputs, sparsity, query_block=128):
    weights = inputs.proj_q, inputs.proj_k
    return select_key_blocks(inputs.q, inputs.k, *weights, sparsity=sparsity, query_block=query_block)


@pytest.mark.parametrize("knots", [None, 3])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("precision", "dtype"), list(BARS))
def test_error_stays_below_the_bar(generator, precision, dtype, head_dim, knots):
    inputs = attention_inputs(
        generator, batch=2, tokens=300, keys=420, head_dim=head_dim, dtype=dtype, proj="per head", knots=knots
    )
    if knots and dtype == torch.float64:
        inputs.alpha = inputs.alpha.double() / 3 + 0.1
    options = {"sparsity": 0.6, "precision": precision, "backend": "torch"}
    out, ratio = sla2_attention(*inputs.tensors(), **options, return_alpha=True)
    expected, expected_ratio = inputs.reference(route(inputs, 0.6))
    assert out.dtype == dtype and relative_error(out, expected) < BARS[precision, dtype]
    assert ratio.dtype == torch.float32
    assert relative_error(ratio, expected_ratio) < (1e-6 if precision == "16bit" else 6e-2)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.97])
@pytest.mark.parametrize("tokens", [1, 63, 65, 127, 129, 700])
@pytest.mark.parametrize(("keys", "query_block"), [(1, 128), (64, 128), (130, 128), (130, 64)])
def test_shapes(generator, tokens, keys, query_block, sparsity):
    options = {"query_block": query_block, "sparsity": sparsity}
    inputs = attention_inputs(generator, heads=3, tokens=tokens, keys=keys, head_dim=24, knots=None, **options)
    out = sla2_attention(*inputs.tensors(), precision="16bit", **options)
    assert relative_error(out, inputs.reference(route(inputs, sparsity, query_block))[0]) < 5e-6


@pytest.mark.parametrize("precision", ["16bit", "int8", "fp8"])
@pytest.mark.parametrize("layout", ["BHND", "BNHD"])
def test_views_give_the_bits_of_their_copies(generator, layout, precision):
    inputs = attention_inputs(generator, batch=2, heads=3, tokens=150, keys=200, dtype=torch.float16)
    tensors = [x.transpose(1, 2) if layout == "BNHD" else x for x in (inputs.q, inputs.k, inputs.v)]
    options = {"sparsity": 0.5, "precision": precision, "layout": layout}
    out = sla2_attention(*(embedded(x) for x in tensors), **options)
    assert out.is_contiguous() and torch.isfinite(out).all()
    assert torch.equal(out, sla2_attention(*(x.contiguous() for x in tensors), **options))


@pytest.mark.parametrize("precision", ["16bit", "int8"])
def test_chunks_of_one_query_block_compute_the_same(generator, monkeypatch, precision):
    inputs = attention_inputs(generator, tokens=700, knots=None)
    options = {"sparsity": 0.5, "precision": precision, "return_alpha": True}
    whole, ratio = sla2_attention(*inputs.tensors(), **options)
    monkeypatch.setattr(torch_backend, "CHUNK_BYTES", 1)
    chunked, chunked_ratio = sla2_attention(*inputs.tensors(), **options)
    assert relative_error(chunked, whole) < 1e-6 and relative_error(chunked_ratio, ratio) < 1e-6


def test_autocast_changes_no_bit(generator):
    inputs = attention_inputs(generator, tokens=300, keys=2000, proj="shared", knots=2)
    expected = sla2_attention(*inputs.tensors(), sparsity=0.9, precision="16bit")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sla2_attention(*inputs.tensors(), sparsity=0.9, precision="16bit")
    assert torch.equal(found, expected)


def test_a_given_selection_in_any_order_replaces_the_router_s(generator):
    inputs = attention_inputs(generator, heads=3, tokens=300, keys=500)
    key_blocks = torch.rand(1, 3, 3, 8, generator=generator).argsort(dim=-1)[..., :3]
    out = sla2_attention(*inputs.tensors(), precision="16bit", key_blocks=key_blocks)
    assert relative_error(out, inputs.reference(key_blocks)[0]) < 2e-6


@pytest.mark.parametrize("precision", ["16bit", "int8", "fp8"])
def test_hard_inputs_stay_finite(generator, precision):
    inputs = attention_inputs(generator, heads=1, tokens=130, keys=300, dtype=torch.float16, knots=None)
    inputs.k[:] = inputs.k[:, :, :1] + 100
    inputs.v[:, :, 64:] = 0
    inputs.q *= 100
    out = sla2_attention(*inputs.tensors(), sparsity=0.5, precision=precision)
    assert torch.isfinite(out).all()
