"""torch.compile and torch.library see one well-behaved operator."""

import typing

import pytest
import torch
import torch._dynamo.testing
from operator_inputs import attention_inputs, normal
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sla2_kernels import gradients, operators, select_key_blocks, sla2_attention
from sla2_kernels.sla_v1 import sla_attention

HOW = {"fullgraph": True, "backend": "aot_eager"}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("layout", ["BHND", "BNHD"])
@pytest.mark.parametrize("knots", [None, 3])
def test_no_graph_break(generator, knots, layout):
    inputs = attention_inputs(generator, tokens=150, keys=150, proj="per head", knots=knots)

    def layer(q, *rest):
        out, ratio = sla2_attention(q * 2, *rest, sparsity=0.5, layout=layout, return_alpha=True)
        return out.transpose(1, 2).flatten(2) + 1, ratio

    tensors = [x.transpose(1, 2) if layout == "BNHD" else x for x in inputs.tensors()[:3]]
    arguments = *tensors, *inputs.tensors()[3:]
    for found, expected in zip(torch.compile(layer, **HOW)(*arguments), layer(*arguments), strict=True):
        assert torch.equal(found, expected)


class Watching(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_only_a_call_that_something_watches_goes_through_torch_s_operator(generator, monkeypatch):
    q, k, v = attention_inputs(generator, tokens=70, keys=70).tensors()[:3]
    expected = sla2_attention(q, k, v, sparsity=0.5)
    with Watching() as watching:
        out = sla2_attention(q, k, v, sparsity=0.5)
    assert watching.seen == ["sla2.attention.default"] and torch.equal(out, expected)
    alpha = torch.full((q.shape[1],), 0.5, requires_grad=True)
    assert sla2_attention(q, k, v, alpha=alpha, sparsity=0.5).grad_fn is not None
    with torch.no_grad():
        assert sla2_attention(q, k, v, alpha=alpha, sparsity=0.5).grad_fn is None
    batched = torch.func.vmap(lambda x: operators._is_plain((x,)) * torch.ones(()))(q)
    assert operators._is_plain((q, None)) and not batched.any()
    calls = []

    class WatchingFunctions(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            calls.append(str(function))
            return function(*args, **(kwargs or {}))

    with WatchingFunctions():
        out = sla2_attention(q, k, v, sparsity=0.5)
    assert "sla2.attention" in calls and torch.equal(out, expected)
    monkeypatch.setattr(operators, "_CAN_BE_PLAIN", False)
    assert not operators._is_plain((q,))


AROUND = {
    "nothing": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
}


@pytest.mark.parametrize("name", ["whole", "negated", "zero"])
@pytest.mark.parametrize("around", AROUND)
def test_a_plain_call_is_torch_s_operator(generator, around, name):
    """Also where q's memory does not hold what q means: torch negates it, or fills in zeros, when it is read."""
    q, k, v = attention_inputs(generator, tokens=70, keys=70).tensors()[:3]
    expected_q = torch.zeros_like(q) if name == "zero" else q
    if name == "negated":
        q = torch.complex(torch.zeros_like(q), -q).conj().imag
    elif name == "zero":
        q = torch._efficientzerotensor(q.shape)
    rest = k, v, None, None, None, None, 0.5, "16bit", True, 32**-0.5, "torch"
    with AROUND[around]():
        expected = torch.ops.sla2.attention(expected_q, *rest)
        assert operators._is_plain((q,)) == (name == "whole")
        for found in (operators.attention(q, *rest), torch.ops.sla2.attention(q, *rest)):
            assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_the_search_for_triton_is_not_compiled(generator, monkeypatch):
    """Looking for an installed package breaks the graph in some releases of torch; here whatever would be traced does."""
    for module in (operators, gradients):
        monkeypatch.setattr(module, "resolve_backend", torch.compiler.disable(module.resolve_backend))
    inputs = attention_inputs(generator, heads=1, tokens=65)
    leaves = [x.detach().clone().requires_grad_() for x in inputs.tensors()[:3]]
    torch.compile(sla2_attention, **HOW)(*leaves, sparsity=0.5).sum().backward()
    assert all(x.grad is not None for x in leaves)


def test_one_operator_in_the_graph(generator):
    inputs = attention_inputs(generator, heads=1, tokens=65)
    calls = []

    def record(graph_module, _):
        calls.extend(node.target for node in graph_module.graph.nodes if node.op == "call_function")
        return graph_module.forward

    torch.compile(sla2_attention, fullgraph=True, backend=record)(*inputs.tensors())
    assert [str(call) for call in calls if "getitem" not in str(call)] == ["sla2.attention"]


def test_lengths_share_their_graphs(generator):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(sla2_attention, dynamic=True, fullgraph=True, backend=counter)
    for tokens, keys in ((130, 300), (257, 511), (700, 2000), (900, 1100)):
        inputs = attention_inputs(generator, tokens=tokens, keys=keys, knots=None)
        expected = sla2_attention(*inputs.tensors()[:3], sparsity=0.5)
        assert torch.equal(compiled(*inputs.tensors()[:3], sparsity=0.5), expected)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("function", [select_key_blocks, sla_attention])
def test_lengths_share_the_graphs_of_what_is_built_on_it(generator, function):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    proj_l = torch.eye(16) / 2, torch.ones(16)
    for tokens in (130, 256, 300, 511, 640, 1100):
        q, k, v = attention_inputs(generator, tokens=tokens, head_dim=16).tensors()[:3]
        arguments = (q, k) if function is select_key_blocks else (q, k, v, proj_l)
        assert torch.equal(compiled(*arguments, sparsity=0.5), function(*arguments, sparsity=0.5))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("proj", ["shared", "per head"])
def test_weights_beside_symbolic_sizes(generator, proj):
    """Every size of q is symbolic, and so are the sizes that weights must have."""
    inputs = attention_inputs(generator, heads=2, tokens=150, keys=150, head_dim=16, proj=proj, knots=3)
    proj_l = torch.eye(16) / 2, torch.ones(16)
    for function, arguments in (
        (sla2_attention, inputs.tensors()),
        (sla_attention, (*inputs.tensors()[:3], proj_l)),
        (select_key_blocks, (inputs.q, inputs.k, inputs.proj_q, inputs.proj_k)),
    ):
        compiled = torch.compile(function, dynamic=True, **HOW)
        assert torch.equal(compiled(*arguments, sparsity=0.5), function(*arguments, sparsity=0.5))


LENGTHS = [(1, 1), (2, 2), (64, 64), (65, 65), (129, 129), (640, 640), (1, 300), (100, 1), (200, 64), (300, 1000)]


@pytest.mark.skipif(torch.__version__ < "2.8", reason="it compiles once more for one block")
def test_as_many_graphs_as_dense_attention():
    """Block counts of one, of queries, keys and selected blocks, are no cases of their own."""
    dense = graphs(torch.nn.functional.scaled_dot_product_attention)
    assert graphs(half_sparse) <= dense
    assert graphs(half_sparse_with_ratio, backward=True) <= dense


def half_sparse(q, k, v):
    return sla2_attention(q, k, v, sparsity=0.5)


def half_sparse_with_ratio(q, k, v):
    alpha = 0.5 + 0 * q[0, :, :1].mean(dim=-1)
    out, ratio = sla2_attention(q, k, v, alpha=alpha, sparsity=0.5, return_alpha=True)
    return out * ratio[..., None]


def graphs(function, backward=False):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, dynamic=True, fullgraph=True, backend=counter)
    for tokens, keys in LENGTHS:
        out = compiled(*(torch.randn(1, 2, n, 16, requires_grad=backward) for n in (tokens, keys, keys)))
        if backward:
            out.sum().backward()
    return counter.frame_count


@pytest.mark.parametrize("name", ["scale", "sparsity"])
def test_a_number_that_changes_between_calls(generator, name):
    """One graph a value, as in dense attention."""
    q, k, v = attention_inputs(generator, heads=1, tokens=65, keys=200).tensors()[:3]
    compiled = torch.compile(sla2_attention, **HOW)
    for value in (0.2, 0.4, 0.6):
        expected = sla2_attention(q, k, v, **{"sparsity": 0.5, name: value})
        assert torch.equal(compiled(q, k, v, **{"sparsity": 0.5, name: value}), expected)


@pytest.mark.parametrize("given", [2**32, 2**32 + 1, -(2**32), 2**31])
def test_indices_beyond_32_bits_are_clamped_where_no_check_reads_them(generator, given):
    q, k, v = attention_inputs(generator, heads=1, tokens=65, keys=200).tensors()[:3]
    compiled = torch.compile(sla2_attention, **HOW)
    found, expected = (
        compiled(q, k, v, key_blocks=torch.full((1, 1, 1, 1), block)) for block in (given, 3 if given > 0 else 0)
    )
    assert torch.equal(found, expected)


def test_a_selection_handed_in(generator):
    inputs = attention_inputs(generator, tokens=130, keys=300)
    key_blocks = select_key_blocks(inputs.q, inputs.k, sparsity=0.5)

    def layer(q, k, v, key_blocks):
        return sla2_attention(q, k, v, key_blocks=key_blocks)

    arguments = inputs.q, inputs.k, inputs.v, key_blocks
    assert torch.equal(torch.compile(layer, **HOW)(*arguments), layer(*arguments))


def test_gradients_through_a_compiled_layer(generator):
    inputs = attention_inputs(generator, tokens=130, keys=200, knots=2)
    weight = normal(generator, *inputs.q.shape)
    found, expected = [], []
    for grads, function in ((found, torch.compile(sla2_attention, **HOW)), (expected, sla2_attention)):
        leaves = [x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.alpha)]
        (function(*leaves[:3], alpha=leaves[3], sparsity=0.5) * weight).sum().backward()
        grads.extend(x.grad for x in leaves)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.skipif(torch.__version__ < "2.9", reason="torch.compile has a sentence of its own here")
def test_the_compiled_call_refuses_what_the_plain_one_refuses(generator):
    inputs = attention_inputs(generator, heads=1, tokens=65)
    with pytest.raises(Exception, match="sparsity must be at least 0 and below 1"):
        torch.compile(sla2_attention, **HOW)(*inputs.tensors(), sparsity=1.5)


# list[int] is not one of them, and an operator that has it cannot even be imported
TYPES_OF_TORCH_2_6 = {torch.Tensor, typing.Optional[torch.Tensor], typing.List[int], int, typing.Optional[int], float, bool, str}  # noqa: UP006, UP045  # fmt: skip


def test_torch_2_6_knows_every_operator_s_types():
    ours = {name: operator._init_fn for name, operator in OPDEFS.items() if name.startswith("sla2::")}
    assert len(ours) == 5
    for name, function in ours.items():
        hints = typing.get_type_hints(function)
        hints.pop("return")
        assert set(hints.values()) <= TYPES_OF_TORCH_2_6, name


@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize("given", [True, False], ids=["selection given", "routed"])
def test_the_operator_s_registration(generator, heads_first, given):
    inputs = attention_inputs(generator, tokens=130, keys=200, head_dim=16, proj="shared", knots=2)
    tensors = [x.transpose(1, 2) if not heads_first else x for x in (inputs.q, inputs.k, inputs.v)]
    key_blocks = select_key_blocks(inputs.q, inputs.k, sparsity=0.5) if given else None
    rest = key_blocks, 0.5, "16bit", heads_first, 0.25, "torch"
    operator = torch.ops.sla2.attention.default
    torch.library.opcheck(operator, (*tensors, inputs.proj_q, inputs.proj_k, inputs.alpha, *rest))
    leaves = [x.detach().requires_grad_() for x in (*tensors, inputs.alpha)]
    arguments = *leaves[:3], inputs.proj_q, inputs.proj_k, leaves[3], *rest
    torch.library.opcheck(operator, arguments)


def test_the_operator_s_registration_without_the_linear_branch_on_our_own_selection(generator):
    inputs = attention_inputs(generator, tokens=130, keys=200, head_dim=16)
    key_blocks = select_key_blocks(inputs.q, inputs.k, sparsity=0.5, query_block=64)
    leaves = [x.requires_grad_() for x in inputs.tensors()[:3]]
    arguments = (
        *leaves,
        None,
        None,
        None,
        key_blocks,
        0.5,
        "16bit",
        True,
        0.25,
        "torch",
        None,
        False,
        True,
        0,
        0,
        0,
        0,
        64,
    )
    torch.library.opcheck(torch.ops.sla2.attention.default, arguments)
