"""Triton's backward pass against float64 autograd of the definition, on the selection that the forward used."""

import pytest
import torch
from operator_inputs import attention_inputs, embedded, normal

from sla2_kernels import select_key_blocks, sla2_attention, triton_backward
from sla2_kernels.kernels.backward_keys import selecting_blocks
from sla2_kernels.reference import sla2_reference

# a key past the ragged end may get any P: nothing of it is written
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{word} encountered") for word in ("overflow", "invalid value", "divide by zero")
]

CASES = {
    "ragged queries and keys": {"tokens": 300, "keys": 330, "sparsity": 0.5, "knots": 3, "head_dim": 32},
    "whole blocks": {"tokens": 256, "keys": 256, "sparsity": 0.7, "heads": 1, "head_dim": 64},
    "estimated ratio": {"tokens": 200, "keys": 300, "sparsity": 0.6, "knots": None, "head_dim": 32},
    "one selected block": {"tokens": 260, "keys": 400, "sparsity": 0.97, "head_dim": 32},
    "all blocks selected": {"tokens": 130, "keys": 140, "sparsity": 0, "head_dim": 32},
    "one key block": {"tokens": 30, "keys": 20, "sparsity": 0.9, "head_dim": 32},
    "two batches": {"batch": 2, "heads": 1, "tokens": 140, "keys": 200, "sparsity": 0.5, "head_dim": 32},
    "another scale": {"tokens": 128, "keys": 200, "sparsity": 0.5, "head_dim": 32, "scale": 0.4},
    "head_dim 128": {"tokens": 20, "keys": 130, "sparsity": 0.5, "heads": 1, "head_dim": 128},
    "64 query tokens": {"tokens": 300, "keys": 330, "sparsity": 0.5, "knots": 3, "head_dim": 32, "query_block": 64},
}


def gradients(inputs, grad, *, key_blocks=None, precision="16bit", layout="BHND", backend="triton"):
    """(dq, dk, dv, dalpha or None) of the operator, all heads first."""
    tensors = [
        t if t is None else t.detach().clone().requires_grad_() for t in (inputs.q, inputs.k, inputs.v, inputs.alpha)
    ]
    views = [t if layout == "BHND" else t.transpose(1, 2) for t in tensors[:3]]
    options = inputs.options | {"key_blocks": key_blocks}
    out = sla2_attention(*views, alpha=tensors[3], precision=precision, layout=layout, backend=backend, **options)
    out.backward(grad if layout == "BHND" else grad.transpose(1, 2))
    return [None if t is None else t.grad for t in tensors]


def expected_gradients(inputs, grad, key_blocks):
    tensors = [t if t is None else t.double().requires_grad_() for t in (inputs.q, inputs.k, inputs.v, inputs.alpha)]
    out, _ = sla2_reference(*tensors[:3], alpha=tensors[3], key_blocks=key_blocks, **inputs.options)
    out.backward(grad.double())
    return [None if t is None else t.grad for t in tensors]


def ratio_terms(inputs, grad, key_blocks):
    """Norm of what dalpha sums up, dO (O_s - O_l): the sum itself may cancel, and its rounding does not.

    The output is linear in alpha, so two of its values give O_s - O_l.
    """
    high, low = (
        sla2_reference(
            inputs.q,
            inputs.k,
            inputs.v,
            key_blocks=key_blocks,
            alpha=torch.full((inputs.q.shape[1],), ratio),
            **inputs.options,
        )[0]
        for ratio in (0.75, 0.25)
    )
    return (grad.double() * (high - low) * 2).norm()


def selection(inputs):
    options = {name: value for name, value in inputs.options.items() if name != "scale"}
    return select_key_blocks(inputs.q, inputs.k, backend="torch", **options)


def assert_gradients(found, expected, bar, ratio_terms=0):
    for name, ours, theirs in zip(("dq", "dk", "dv", "dalpha"), found, expected, strict=True):
        if theirs is None:
            assert ours is None
        elif theirs.norm() == 0:
            assert not ours.any(), name
        else:
            size = max(theirs.norm(), ratio_terms if name == "dalpha" else 0)
            assert (ours.double() - theirs).norm() < bar * size, name


def check(inputs, grad, bar):
    """Triton's gradients against the definition's, on one selection."""
    blocks = selection(inputs)
    expected = expected_gradients(inputs, grad, blocks)
    assert_gradients(gradients(inputs, grad, key_blocks=blocks), expected, bar, ratio_terms(inputs, grad, blocks))


@pytest.mark.parametrize("case", CASES)
def test_float32_gradients(generator, case):
    inputs = attention_inputs(generator, **CASES[case])
    check(inputs, normal(generator, *inputs.q.shape), 1e-5)


def test_float16_gradients(generator):
    inputs = attention_inputs(generator, tokens=300, keys=290, head_dim=32, sparsity=0.6, knots=2, dtype=torch.float16)
    check(inputs, normal(generator, *inputs.q.shape, dtype=torch.float16), 1e-3)


def test_rows_that_a_few_keys_decide(generator):
    """There dP is close to delta, so that dS must be rounded after the subtraction, although delta is known last."""
    inputs = attention_inputs(generator, tokens=130, keys=400, head_dim=32, sparsity=0.3, dtype=torch.float16)
    inputs.q *= 16
    check(inputs, normal(generator, *inputs.q.shape, dtype=torch.float16), 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_keys_with_a_large_mean(generator, dtype):
    """Softmax does not see it, so the gradients must not either, whatever rounding does to a row of dS."""
    inputs = attention_inputs(generator, tokens=130, keys=260, head_dim=32, sparsity=0.5, dtype=dtype)
    inputs.k += 40
    check(inputs, normal(generator, *inputs.q.shape, dtype=dtype), 1e-4 if dtype == torch.float32 else 2e-3)


def test_sharp_queries_and_keys(generator):
    """Features far apart: phi(Q) Z is tiny, and nothing may become infinite."""
    inputs = attention_inputs(generator, tokens=130, keys=200, head_dim=32, sparsity=0.5)
    inputs.q *= 12
    inputs.k *= 12
    check(inputs, normal(generator, *inputs.q.shape), 1e-3)


def test_views_of_any_stride_and_both_layouts(generator):
    inputs = attention_inputs(generator, tokens=150, keys=200, head_dim=32, sparsity=0.5)
    grad, blocks = normal(generator, *inputs.q.shape), selection(inputs)
    expected = gradients(inputs, grad, key_blocks=blocks)
    found = gradients(inputs, grad, key_blocks=blocks, layout="BNHD")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    leaves = [t.requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    views = [embedded(t.detach()).requires_grad_() for t in leaves]
    out = sla2_attention(*views, alpha=inputs.alpha, key_blocks=blocks, precision="16bit", backend="triton")
    found = torch.autograd.grad(out, views, embedded(grad))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=False))


def test_a_gradient_of_stride_zero(generator):
    inputs = attention_inputs(generator, tokens=130, keys=200, head_dim=32, sparsity=0.5)
    check(inputs, torch.ones(()).expand(inputs.q.shape), 1e-5)


def test_repeats_are_bitwise_equal_and_head_groups_change_nothing(generator, monkeypatch):
    inputs = attention_inputs(generator, tokens=130, keys=130, head_dim=32, sparsity=0.5, knots=2)
    grad = normal(generator, *inputs.q.shape)
    first = gradients(inputs, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(inputs, grad), strict=True))
    one_head_each = [slice(i, i + 1) for i in range(2)]
    monkeypatch.setattr(triton_backward, "_head_groups", lambda *_: one_head_each)
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(inputs, grad), strict=True))


def test_the_low_bit_forward_has_the_16_bit_backward(generator):
    inputs = attention_inputs(generator, heads=1, tokens=130, keys=140, head_dim=32, sparsity=0.5)
    grad = normal(generator, *inputs.q.shape)
    exact, low = (gradients(inputs, grad, precision=precision) for precision in ("16bit", "int8"))
    assert all(torch.equal(a, b) for a, b in zip(exact, low, strict=True))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_alpha_by_finite_differences(generator, backend):
    inputs = attention_inputs(generator, tokens=300, keys=130, head_dim=32, sparsity=0.5, knots=3)
    grad, blocks, step = normal(generator, *inputs.q.shape), selection(inputs), 1e-2
    found = gradients(inputs, grad, key_blocks=blocks, backend=backend)[3]

    def loss(alpha):
        out = sla2_attention(
            inputs.q, inputs.k, inputs.v, alpha=alpha, key_blocks=blocks, precision="16bit", backend=backend
        )
        return (out.double() * grad).sum()

    for head, knot in ((0, 0), (1, 1)):
        shift = torch.zeros_like(inputs.alpha)
        shift[head, knot] = step
        # the output is linear in alpha, so the step's size costs no accuracy
        slope = (loss(inputs.alpha + shift) - loss(inputs.alpha - shift)) / (2 * step)
        assert abs(slope - found[head, knot]) < 1e-4 * found.norm()


def test_the_returned_ratio_has_a_gradient_too(generator):
    inputs = attention_inputs(generator, tokens=200, keys=200, head_dim=32, sparsity=0.5)
    alpha = inputs.alpha.requires_grad_()
    _, ratio = sla2_attention(
        inputs.q, inputs.k, inputs.v, alpha=alpha, sparsity=0.5, precision="16bit", backend="triton", return_alpha=True
    )
    ratio.sum().backward()
    torch.testing.assert_close(alpha.grad, torch.full_like(alpha, 200.0))


def test_the_transposed_list(generator):
    selected = torch.rand(3, 7, 9, generator=generator).argsort(dim=-1)[..., :4].to(torch.int32).sort(dim=-1).values
    query_blocks, starts = selecting_blocks(selected, 9)
    for head in range(3):
        for j in range(9):
            expected = (selected[head] == j).any(dim=-1).nonzero().flatten()
            assert torch.equal(query_blocks[head, starts[head, j] : starts[head, j + 1]].long(), expected)


def test_one_operator_for_torch_compile(generator):
    inputs = attention_inputs(generator, tokens=130, keys=200, head_dim=32, sparsity=0.5)
    grad = normal(generator, *inputs.q.shape)
    expected = gradients(inputs, grad)
    tensors = [t.detach().clone().requires_grad_() for t in (inputs.q, inputs.k, inputs.v, inputs.alpha)]

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(q, k, v, alpha):
        return sla2_attention(q, k, v, alpha=alpha, sparsity=0.5, precision="16bit", backend="triton")

    run(*tensors).backward(grad)
    assert_gradients([t.grad for t in tensors], expected, 1e-6)


def test_what_waits_for_the_backward_pass(generator):
    """FlashAttention keeps q, k, v, the output and a log-sum-exp per row; this keeps no output."""
    inputs = attention_inputs(generator, tokens=300, head_dim=32, sparsity=0.5, dtype=torch.float16)
    leaves = [t.requires_grad_() for t in (inputs.q, inputs.k, inputs.v, inputs.alpha)]
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sla2_attention(*leaves[:3], alpha=leaves[3], sparsity=0.5, precision="16bit", backend="triton")
    rows = inputs.q.shape[:3].numel()
    # the poisoned memory of these tests has guards around each tensor
    assert sum(kept.values()) < 4 * inputs.q.nbytes + 4 * rows + 16 * 1024
