"""Gradients of the operator against autograd through the float64 definition."""

import pytest
import torch
from operator_inputs import attention_inputs, normal, relative_error
from torch.autograd import forward_ad

from sla2_kernels import select_key_blocks, sla2_attention
from sla2_kernels.reference import sla2_reference
from sla2_kernels.video_attention import video_attention


def leaves_of(inputs):
    """q, k, v and alpha (None stays None) as separate leaves."""
    tensors = inputs.q, inputs.k, inputs.v, inputs.alpha
    return [x if x is None else x.detach().clone().requires_grad_() for x in tensors]


def reference_gradients(inputs, key_blocks, weight):
    q, k, v, alpha = leaves = leaves_of(inputs)
    out, _ = sla2_reference(q, k, v, alpha=alpha, key_blocks=key_blocks, **inputs.options)
    (out * weight).sum().backward()
    return [x.grad for x in leaves if x is not None]


def operator_gradients(inputs, weight, **options):
    q, k, v, alpha = leaves = leaves_of(inputs)
    out = sla2_attention(q, k, v, alpha=alpha, **options)
    (out * weight.to(out.dtype)).sum().backward()
    return [x.grad for x in leaves if x is not None]


@pytest.mark.parametrize("knots", [None, 0, 3])
@pytest.mark.parametrize(
    ("tokens", "keys", "sparsity", "query_block"),
    [(1, 65, 0.5, 128), (129, 300, 0.5, 128), (300, 200, 0.7, 128), (130, 64, 0.0, 128), (300, 200, 0.7, 64)],
)
def test_float64_gradients_are_exact(generator, tokens, keys, sparsity, query_block, knots):
    inputs = attention_inputs(
        generator, batch=2, tokens=tokens, keys=keys, head_dim=16, dtype=torch.float64, knots=knots,
        sparsity=sparsity, query_block=query_block,
    )  # fmt: skip
    inputs.alpha = None if knots is None else inputs.alpha.double()
    key_blocks = select_key_blocks(inputs.q, inputs.k, **inputs.options)
    weight = normal(generator, *inputs.q.shape).double()
    expected = reference_gradients(inputs, key_blocks, weight)
    found = operator_gradients(inputs, weight, precision="16bit", **inputs.options)
    for grad, wanted in zip(found, expected, strict=True):
        assert (grad - wanted).norm() <= 1e-10 * wanted.norm() + 1e-12


@pytest.mark.parametrize(
    ("precision", "dtype", "bar"),
    [
        ("16bit", torch.float32, 1e-5),
        ("16bit", torch.float16, 5e-3),
        ("16bit", torch.bfloat16, 3e-2),
        ("int8", torch.float32, 1e-1),
        ("fp8", torch.float32, 1.5e-1),
    ],
)
def test_gradients_by_format(generator, precision, dtype, bar):
    inputs = attention_inputs(generator, tokens=200, keys=300, dtype=dtype, knots=2)
    key_blocks = select_key_blocks(inputs.q, inputs.k, sparsity=0.5)
    weight = normal(generator, *inputs.q.shape, dtype=dtype)
    expected = reference_gradients(inputs, key_blocks, weight.double())
    found = operator_gradients(inputs, weight, sparsity=0.5, precision=precision)
    for grad, wanted in zip(found[:3], expected[:3], strict=True):
        assert grad.dtype == dtype and relative_error(grad, wanted) < bar
    assert found[3].dtype == torch.float32 and found[3].shape == inputs.alpha.shape


def test_finite_differences(generator):
    inputs = attention_inputs(generator, heads=2, tokens=3, keys=130, head_dim=4, dtype=torch.float64, knots=2)
    inputs.alpha = inputs.alpha.double()
    key_blocks = torch.tensor([[0, 2], [1, 2]]).view(1, 2, 1, 2)

    def operator(q, k, v, alpha):
        return sla2_attention(q, k, v, alpha=alpha, key_blocks=key_blocks, precision="16bit")

    assert torch.autograd.gradcheck(operator, leaves_of(inputs), fast_mode=True)


@pytest.mark.parametrize("layout", ["BHND", "BNHD"])
def test_expanded_and_strided_output_gradients(generator, layout):
    inputs = attention_inputs(generator, tokens=130, keys=200, head_dim=16, dtype=torch.float64, knots=None)
    if layout == "BNHD":
        inputs.q, inputs.k, inputs.v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
    leaves = leaves_of(inputs)[:3]
    out = sla2_attention(*leaves, sparsity=0.5, precision="16bit", layout=layout)
    strided = normal(generator, *reversed(out.shape)).double().permute(3, 2, 1, 0)
    for gradient in (torch.ones(1, dtype=torch.float64).expand_as(out), strided):
        found = torch.autograd.grad(out, leaves, gradient, retain_graph=True)
        expected = torch.autograd.grad(out, leaves, gradient.contiguous(), retain_graph=True)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_a_tensor_used_three_times_gathers_all_gradients(generator):
    x = normal(generator, 1, 2, 200, 16).double().requires_grad_()
    key_blocks = select_key_blocks(x, x, sparsity=0.5)
    weight = normal(generator, 1, 2, 200, 16).double()
    (found,) = torch.autograd.grad((sla2_attention(x, x, x, sparsity=0.5, precision="16bit") * weight).sum(), x)
    (expected,) = torch.autograd.grad((sla2_reference(x, x, x, key_blocks=key_blocks)[0] * weight).sum(), x)
    assert relative_error(found, expected) < 1e-10


def test_expanded_keys_gather_the_gradients_of_their_heads(generator):
    inputs = attention_inputs(generator, heads=3, tokens=130, keys=200, head_dim=16, dtype=torch.float64)
    shared = inputs.k[:, :1].clone().requires_grad_()
    apart = shared.detach().expand(-1, 3, -1, -1).clone().requires_grad_()
    for k in (shared.expand(-1, 3, -1, -1), apart):
        sla2_attention(inputs.q, k, inputs.v, sparsity=0.5, precision="16bit").square().sum().backward()
    assert relative_error(shared.grad, apart.grad.sum(dim=1, keepdim=True)) < 1e-12


def test_gradient_flows_through_the_mean_of_k(generator):
    """An offset of all keys changes no output, so K's gradients sum to zero."""
    inputs = attention_inputs(generator, tokens=130, keys=200, dtype=torch.float64)
    k = inputs.k.requires_grad_()
    sla2_attention(inputs.q, k, inputs.v, sparsity=0.5, precision="16bit").square().sum().backward()
    assert k.grad.abs().max() > 1e-3 and k.grad.sum(dim=2).abs().max() < 1e-10


def test_only_what_asks_for_a_gradient_gets_one_and_the_router_never_does(generator):
    inputs = attention_inputs(generator, tokens=130, keys=200, proj="shared", knots=2)
    for x in (inputs.v, inputs.proj_q, inputs.proj_k):
        x.requires_grad_()
    sla2_attention(*inputs.tensors(), sparsity=0.5).sum().backward()
    assert inputs.v.grad.abs().sum() > 0
    assert all(x.grad is None for x in (inputs.q, inputs.k, inputs.alpha, inputs.proj_q, inputs.proj_k))


@pytest.mark.parametrize("bound", [None, 0.0, 1.0])
def test_the_ratio_handed_back_passes_its_gradient_to_alpha(generator, bound):
    inputs = attention_inputs(generator, batch=2, tokens=300, keys=200, knots=2)
    if bound is not None:
        inputs.alpha[0] = bound
    key_blocks = select_key_blocks(inputs.q, inputs.k, sparsity=0.5)
    weight = normal(generator, 2, 2, 300)
    found, expected = (inputs.alpha.clone().requires_grad_() for _ in range(2))
    _, ratio = sla2_attention(inputs.q, inputs.k, inputs.v, alpha=found, sparsity=0.5, return_alpha=True)
    (ratio * weight).sum().backward()
    _, ratio = sla2_reference(inputs.q, inputs.k, inputs.v, alpha=expected, key_blocks=key_blocks)
    (ratio * weight).sum().backward()
    assert relative_error(found.grad, expected.grad) < 1e-5


def test_gradients_do_not_depend_on_the_chunks(generator, monkeypatch):
    from sla2_kernels import torch_backend

    inputs = attention_inputs(generator, tokens=500, keys=300, dtype=torch.float64)
    weight = normal(generator, *inputs.q.shape).double()
    whole = operator_gradients(inputs, weight, sparsity=0.5, precision="16bit")
    monkeypatch.setattr(torch_backend, "CHUNK_BYTES", 1)
    chunked = operator_gradients(inputs, weight, sparsity=0.5, precision="16bit")
    assert all(relative_error(x, y) < 1e-10 for x, y in zip(chunked, whole, strict=True))


def half_sparse(q, k, v):
    return sla2_attention(q, k, v, sparsity=0.5)


def through_alpha(q, k, v):
    x = torch.ones_like(k)
    return sla2_attention(x, x, x, alpha=q[0, :, :1, 0].sigmoid(), sparsity=0.5)


def top_k_of_a_video(q, k, v):
    return video_attention(q, k, v, front=10, sparsity=0.5, method="top-k only")


def forward_dual(function, q, k, v):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(q, q), k, v)


def with_gradient(function, q, k, v):
    return forward_dual(function, q.requires_grad_(), k, v)


def jvp(function, *tensors):
    return torch.func.jvp(function, tensors, tensors)


def compiled_jvp(function, *tensors):
    return torch.compile(jvp, fullgraph=True, backend="eager")(function, *tensors)


OWN_SENTENCE = pytest.mark.skipif(torch.__version__ < "2.9", reason="torch.compile has a sentence of its own here")


def test_torch_func_is_refused_in_one_sentence(generator):
    q, k, v = attention_inputs(generator, tokens=130, head_dim=16).tensors()[:3]

    def total(q, factor):
        return (half_sparse(q, k, v) * factor).sum()

    for derive in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(
            NotImplementedError, match=r"cannot be differentiated by torch.func \(grad, vjp, jacrev\): use"
        ):
            derive(total)(q, torch.tensor(2.0))
    assert torch.func.grad(total, argnums=1)(q, torch.tensor(2.0)).isfinite()


@pytest.mark.parametrize("derive", [jvp, forward_dual, with_gradient, pytest.param(compiled_jvp, marks=OWN_SENTENCE)])
@pytest.mark.parametrize("function", [half_sparse, through_alpha, top_k_of_a_video])
def test_forward_mode_is_refused_as_dense_attention_refuses_it(generator, derive, function):
    q, k, v = attention_inputs(generator, tokens=130, head_dim=16).tensors()[:3]
    with pytest.raises(NotImplementedError if derive is not compiled_jvp else Exception, match="forward") as caught:
        derive(function, q, k, v)
    assert "has no forward-mode derivative" in str(caught.value) and "use reverse mode" in str(caught.value)
    with pytest.raises(NotImplementedError):
        forward_dual(torch.nn.functional.scaled_dot_product_attention, q, k, v)


@pytest.mark.parametrize("layout", ["BHND", "BNHD"])
def test_the_output_may_be_written_into(generator, layout):
    """Autograd refuses to where an operator hands out views."""
    inputs = attention_inputs(generator, tokens=130, keys=200, head_dim=16)
    axes = (1, 2) if layout == "BNHD" else (1, 1)
    grads = []
    for change in (lambda out: out.mul_(2).add_(1), lambda out: out * 2 + 1):
        leaves = [x.detach().transpose(*axes).contiguous().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        out = sla2_attention(*leaves, sparsity=0.5, precision="16bit", layout=layout)
        assert out.is_contiguous() and not out._is_view()
        change(out).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))


@pytest.mark.parametrize("layout", ["BHND", "BNHD"])
def test_rows_that_the_caller_writes_beside_the_operators_keep_their_gradients(generator, layout):
    inputs, others = attention_inputs(generator, tokens=130, keys=200, head_dim=16), normal(generator, 1, 2, 8, 16)
    tokens, grads, outs = (1 if layout == "BNHD" else 2), [], []
    weight = normal(generator, 1, 2, 138, 16)
    for room in ((3, 5), (0, 0)):
        leaves = [x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v, others)]
        q, k, v, rows = (x.transpose(1, 2) if layout == "BNHD" else x for x in leaves)
        out = sla2_attention(q, k, v, sparsity=0.5, precision="16bit", layout=layout, room=room)
        assert not out._is_view()
        if any(room):
            out.narrow(tokens, 0, 3).copy_(rows.narrow(tokens, 0, 3))
            out.narrow(tokens, 133, 5).copy_(rows.narrow(tokens, 3, 5))
        else:
            out = torch.cat([rows.narrow(tokens, 0, 3), out, rows.narrow(tokens, 3, 5)], dim=tokens)
        outs.append(out.transpose(1, 2) if layout == "BNHD" else out)
        (outs[-1] * weight).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    assert torch.equal(*outs) and all(torch.equal(x, y) for x, y in zip(*grads, strict=True))


def test_the_ratio_may_be_written_into(generator):
    inputs = attention_inputs(generator, tokens=130, keys=200, head_dim=16)
    _, ratio = sla2_attention(*leaves_of(inputs)[:3], sparsity=0.5, return_alpha=True)
    assert not ratio._is_view() and ratio.mul_(2).isfinite().all()
