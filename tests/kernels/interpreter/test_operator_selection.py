"""Routing in Triton picks what the torch router picks; a selection can be handed in, in any order."""

import pytest
import torch
from operator_inputs import assert_same_selection, attention_inputs, normal, projection, relative_error

from sla2_kernels import select_key_blocks, sla2_attention
from sla2_kernels.forced_blocks import select_with_forced_blocks
from sla2_kernels.reference import router_scores, with_diagonal

pytestmark = pytest.mark.usefixtures("wide_tiles")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "keys", "sparsity", "proj", "query_block"),
    [
        (1, 1, 0.97, None, 128),
        (129, 700, 0.5, None, 128),
        (129, 700, 0.7, "shared", 64),
        (257, 1500, 0.9, "per head", 128),
    ],
)
def test_both_backends_select_the_same(generator, tokens, keys, sparsity, proj, query_block, dtype):
    inputs = attention_inputs(generator, batch=2, heads=2, tokens=tokens, keys=keys, dtype=dtype, proj=proj)
    arguments = inputs.q, inputs.k, inputs.proj_q, inputs.proj_k
    found, expected = (
        select_key_blocks(*arguments, sparsity=sparsity, backend=backend, query_block=query_block)
        for backend in ("triton", "torch")
    )
    k_smooth = inputs.k.double() - inputs.k.double().mean(dim=2, keepdim=True)
    scores = router_scores(inputs.q.double(), k_smooth, inputs.proj_q, inputs.proj_k, query_block=query_block)
    assert_same_selection(found, expected, scores)


def test_weights_of_any_dtype_and_stride_are_taken(generator):
    inputs = attention_inputs(generator, tokens=300, proj="per head")
    q, k, v, proj_q, proj_k, alpha = inputs.tensors()
    views = [x.double().transpose(-1, -2).contiguous().transpose(-1, -2) for x in (proj_q, proj_k)]
    assert not any(view.is_contiguous() for view in views)
    expected = sla2_attention(q, k, v, proj_q, proj_k, alpha, sparsity=0.5, backend="triton", precision="16bit")
    found = sla2_attention(q, k, v, *views, alpha.double(), sparsity=0.5, backend="triton", precision="16bit")
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("tokens", "query_block"), [(65, 128), (300, 128), (641, 128), (300, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_backends_keep_the_same_diagonal(generator, tokens, query_block, dtype):
    inputs = attention_inputs(generator, batch=2, tokens=tokens, dtype=dtype, proj="per head")
    arguments = inputs.q, inputs.k, inputs.proj_q, inputs.proj_k
    found, expected, free = (
        select_key_blocks(*arguments, sparsity=0.6, backend=backend, keep_diagonal=kept, query_block=query_block)
        for backend, kept in (("triton", True), ("torch", True), ("torch", False))
    )
    k_smooth = inputs.k.double() - inputs.k.double().mean(dim=2, keepdim=True)
    scores = router_scores(inputs.q.double(), k_smooth, inputs.proj_q, inputs.proj_k, query_block=query_block)
    assert_same_selection(found, expected, with_diagonal(scores, query_block))
    assert tokens == 65 or not torch.equal(expected, free)


@pytest.mark.parametrize(("front", "query_block"), [(64, 128), (70, 128), (70, 64)])
def test_both_backends_keep_the_same_diagonal_behind_other_tokens(generator, front, query_block):
    q, k = normal(generator, 1, 2, 500, 32), normal(generator, 1, 2, front + 500, 32)
    options = {"sparsity": 0.5, "front": front, "keep_diagonal": True, "query_block": query_block}
    found, expected = (select_with_forced_blocks(q, k, backend=backend, **options) for backend in ("triton", "torch"))
    # Gaussian scores: no two of them are as near to each other as the two backends are
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("front", "back"), [(70, 0), (64, 30)])
@pytest.mark.parametrize("capability", ["8.9", "9.0"])
def test_the_operator_selects_as_much_beside_other_tokens(generator, monkeypatch, capability, front, back):
    monkeypatch.setenv("SLA2_INTERPRET_CAPABILITY", capability)
    q = normal(generator, 1, 2, 500, 32)
    k, v = (normal(generator, 1, 2, front + 500 + back, 32) for _ in range(2))
    options = {"sparsity": 0.5, "backend": "triton", "keep_diagonal": True}
    blocks = select_with_forced_blocks(q, k, front=front, back=back, **options)
    expected = sla2_attention(q, k, v, key_blocks=blocks, alpha=torch.ones(2) / 2, **options)
    assert torch.equal(sla2_attention(q, k, v, exact_keys=(front, back), alpha=torch.ones(2) / 2, **options), expected)


def test_more_key_blocks_than_one_chunk_of_the_selection(generator):
    q, k = normal(generator, 1, 1, 130, 32), normal(generator, 1, 1, 600 * 64 + 1, 32)
    found = select_key_blocks(q, k, sparsity=0.97, backend="triton")
    expected = select_key_blocks(q, k, sparsity=0.97, backend="torch")
    scores = router_scores(q.double(), k.double() - k.double().mean(dim=2, keepdim=True))
    assert found.shape[-1] == 18
    assert_same_selection(found, expected, scores)


def test_equal_keys_select_the_first_blocks(generator):
    q, k = normal(generator, 1, 2, 130, 64), torch.ones(1, 2, 640, 64)
    found = select_key_blocks(q, k, sparsity=0.7, backend="triton")
    assert torch.equal(found, torch.arange(3, dtype=torch.int32).expand(1, 2, 2, 3))


@pytest.mark.parametrize("precision", ["16bit", "int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_given_selection_replaces_the_router_s(generator, dtype, precision):
    inputs = attention_inputs(generator, heads=2, tokens=130, keys=500, knots=None)
    key_blocks = torch.rand(1, 2, 2, 8, generator=generator).argsort(dim=-1)[..., :3].to(dtype)
    options = {"precision": precision, "backend": "triton", "sparsity": 0.1, "key_blocks": key_blocks}
    # the projections would route elsewhere: with a selection given they play no part
    weights = (projection(generator, "shared", 2, 64), None, None)
    out, ratio = sla2_attention(inputs.q, inputs.k, inputs.v, *weights, **options, return_alpha=True)
    expected, expected_ratio = inputs.reference(key_blocks)
    bar = {"16bit": 1e-5, "int8": 6e-2, "fp8": 1e-1}[precision]
    assert relative_error(out, expected) < bar and relative_error(ratio, expected_ratio) < bar


def test_the_router_s_own_selection_handed_in_changes_no_bit(generator):
    inputs = attention_inputs(generator, tokens=300, proj="shared", knots=None)
    options = {"sparsity": 0.5, "backend": "triton"}
    routed = select_key_blocks(inputs.q, inputs.k, inputs.proj_q, inputs.proj_k, **options)
    shuffled = routed.flip(-1).long()
    out = sla2_attention(*inputs.tensors(), **options)
    assert torch.equal(sla2_attention(*inputs.tensors(), **options, key_blocks=shuffled), out)


def test_blocks_out_of_range_are_clamped_where_no_check_can_see_them(generator):
    """As on a GPU, where checking the contents would wait for it: nothing outside K and V is read."""
    inputs = attention_inputs(generator, heads=1, tokens=130, keys=300)
    outside = torch.tensor([-7, 2, 900], dtype=torch.int32).expand(1, 1, 2, 3)
    inside = torch.tensor([0, 2, 4], dtype=torch.int32).expand(1, 1, 2, 3)
    tensors = inputs.q, inputs.k, inputs.v, None, None, None
    results = [
        torch.ops.sla2.attention(*tensors, key_blocks, 0.5, "int8", True, 0.1, "triton")[0]
        for key_blocks in (outside, inside)
    ]
    assert torch.equal(*results) and torch.isfinite(results[0]).all()
