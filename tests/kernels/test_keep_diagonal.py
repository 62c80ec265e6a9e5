"""keep_diagonal: each query block always takes the key blocks of its own tokens, and nothing else about a call changes."""

import pytest
import torch
from operator_inputs import attention_inputs, relative_error

from sla2_kernels import select_key_blocks, sla2_attention
from sla2_kernels.fitted_attention import fitted_attention
from sla2_kernels.forced_blocks import select_with_forced_blocks
from sla2_kernels.reference import sla2_reference
from sla2_kernels.router import own_key_blocks, router_scores


def own_blocks(number, tokens, first=0, size=128):
    """Key blocks that hold the own tokens of a query block of ``size`` tokens, counted token by token."""
    positions = range(first + size * number, first + min(size * (number + 1), tokens))
    return {position // 64 for position in positions}


@pytest.mark.parametrize("size", [128, 64])
@pytest.mark.parametrize("first", [0, 1, 63, 64, 70])
def test_own_key_blocks_are_those_of_its_tokens(first, size):
    keys = 600 + first
    found = own_key_blocks(torch.arange(5), -(-keys // 64), first, size)
    # the last query block may reach past the keys: columns beyond them do not exist
    assert [set(row.nonzero().flatten().tolist()) for row in found] == [
        {block for block in own_blocks(n, 10**9, first, size) if block < found.shape[1]} for n in range(5)
    ]


@pytest.mark.parametrize("tokens", [1, 64, 65, 129, 300, 640])
@pytest.mark.parametrize("layout", ["BHND", "BNHD"])
def test_own_blocks_first_then_the_best_of_the_rest(generator, tokens, layout):
    inputs = attention_inputs(generator, tokens=tokens, proj="per head")
    q, k = (t if layout == "BHND" else t.transpose(1, 2) for t in (inputs.q, inputs.k))
    picked = select_key_blocks(q, k, inputs.proj_q, inputs.proj_k, sparsity=0.6, layout=layout, keep_diagonal=True)
    scores = router_scores(inputs.q, inputs.k, inputs.proj_q, inputs.proj_k)
    for head in range(2):
        for n, row in enumerate(picked[0, head].tolist()):
            # of more own blocks than a row keeps, the first ones
            own = set(sorted(own_blocks(n, tokens))[: len(row)])
            rest = [b for b in scores[0, head, n].argsort(descending=True).tolist() if b not in own]
            assert set(row) == own | set(rest[: len(row) - len(own)])


@pytest.mark.parametrize(("knots", "query_block"), [(None, 128), (2, 128), (2, 64)])
def test_output_and_ratio_are_the_definitions(generator, knots, query_block):
    inputs = attention_inputs(generator, batch=2, tokens=500, proj="shared", knots=knots, dtype=torch.float64)
    inputs.alpha = None if knots is None else inputs.alpha.double()
    options = {"sparsity": 0.6, "keep_diagonal": True, "query_block": query_block}
    out, ratio = sla2_attention(*inputs.tensors(), **options, precision="16bit", return_alpha=True)
    expected, expected_ratio = sla2_reference(*inputs.tensors(), **options)
    assert relative_error(out, expected) < 1e-12 and relative_error(ratio, expected_ratio) < 1e-6
    without, _ = sla2_reference(*inputs.tensors(), sparsity=0.6, query_block=query_block)
    assert relative_error(without, expected) > 1e-3, "these inputs do not tell the two apart"


def test_gradients_are_those_of_the_selection(generator):
    inputs = attention_inputs(generator, tokens=300)
    blocks = select_key_blocks(inputs.q, inputs.k, sparsity=0.6, keep_diagonal=True)
    gradients = []
    for options in ({"sparsity": 0.6, "keep_diagonal": True}, {"key_blocks": blocks}):
        leaves = [x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        sla2_attention(*leaves, precision="16bit", **options).square().sum().backward()
        gradients.append([x.grad for x in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(("front", "back"), [(0, 40), (64, 0), (70, 0), (70, 30), (100, 100)])
def test_beside_forced_blocks_own_ones_are_counted_from_the_video(generator, front, back):
    tokens = 600
    q = torch.randn(1, 2, tokens, 32, generator=generator)
    k = torch.randn(1, 2, front + tokens + back, 32, generator=generator)
    picked = select_with_forced_blocks(q, k, sparsity=0.5, front=front, back=back, keep_diagonal=True)
    for head in range(2):
        for n, row in enumerate(picked[0, head].tolist()):
            assert own_blocks(n, tokens, front) <= set(row)
    free = select_with_forced_blocks(q, k, sparsity=0.5, front=front, back=back)
    assert free.shape == picked.shape and not torch.equal(free, picked)


def test_queries_that_are_not_the_keys_tokens_are_refused():
    q, k = torch.ones(1, 1, 130, 32), torch.ones(1, 1, 200, 32)
    for call in (
        lambda: sla2_attention(q, k, k, keep_diagonal=True),
        lambda: select_key_blocks(q, k, sparsity=0.5, keep_diagonal=True),
    ):
        with pytest.raises(ValueError, match="^keep_diagonal needs as many keys as queries, got "):
            call()
    with pytest.raises(ValueError, match="between front and back as queries, got 190 and 130.$"):
        select_with_forced_blocks(q, k, sparsity=0.5, front=10, keep_diagonal=True)


@pytest.mark.parametrize("attend", [sla2_attention, fitted_attention])
def test_own_blocks_need_room_beside_exact_keys_at_the_end(generator, attend):
    """They come first among the blocks that must be taken, and exact keys at the end would be lost without a word."""
    q, k = (torch.randn(1, 1, tokens, 16, generator=generator) for tokens in (576, 640))
    options = {"keep_diagonal": True, "exact_keys": (0, 64), "precision": "16bit", "backend": "torch"}
    rows = {} if attend is sla2_attention else {"rows": torch.arange(32, dtype=torch.int32), "fitted": 24}
    with pytest.raises(ValueError, match="needs 3 selected key blocks before them"):
        attend(q, k, k, sparsity=0.9, **options, **rows)
    attend(q, k, k, sparsity=0.6, **options, **rows)
