"""Numbers that break attention kernels. With the torch backend; test_tritons_interpreter.py runs this file with the kernels."""

import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sla2_kernels import arguments, select_key_blocks, sla2_attention
from sla2_kernels.reference import sla2_reference
from sla2_kernels.selection import distinct_blocks
from sla2_kernels.support import interpreting

sys.path.append(str(Path(__file__).resolve().parents[1] / "kernels"))
from operator_inputs import attention_inputs, relative_error

BACKEND = "triton" if interpreting() else "torch"
PRECISIONS = ("16bit", "int8", "fp8")
NAN, INFINITY = float("nan"), float("inf")
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered")


@pytest.fixture(autouse=True)
def wide_tiles(monkeypatch):
    """The interpreter pays per program."""
    if interpreting():
        from sla2_kernels.kernels import configs

        wide = configs.ProductConfig(tile_m=16, tile_n=4096, tile_k=32, num_warps=4, num_stages=1)
        monkeypatch.setattr(configs, "product_config", lambda capability, element_size: wide)


def make(seed=0, batch=1, heads=1, tokens=200, keys=260, head_dim=32, dtype=torch.float32, knots=None):
    generator = torch.Generator().manual_seed(seed)
    return attention_inputs(
        generator, batch=batch, heads=heads, tokens=tokens, keys=keys, head_dim=head_dim, dtype=dtype, knots=knots
    )


def run(inputs, precision="16bit", sparsity=0.5, **options):
    return sla2_attention(*inputs.tensors(), precision=precision, sparsity=sparsity, backend=BACKEND, **options)


@pytest.fixture
def unread(monkeypatch):
    """As on a GPU, where sla2_attention does not look at the contents of what it is given."""
    monkeypatch.setattr(arguments, "_may_read", lambda tensor: False)


def same_bits(a, b):
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0.5), b.nan_to_num(0.5))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_and_infinity_stay_where_attention_takes_them(name, value, precision):
    """In q: its query block (16 bit: its row). In k: its head. In v: its head, at 16 bit its channel. Not one bit elsewhere.

    But for q at INT8, whose channels are balanced by rows of the whole head: the head's other rows are rounded otherwise.
    """
    clean, spoilt = make(batch=2, heads=2), make(batch=2, heads=2)
    getattr(spoilt, name)[1, 0, 130, 3] = value
    expected, found = run(clean, precision), run(spoilt, precision)
    reached = torch.zeros_like(expected, dtype=torch.bool)
    if name == "q":
        reached[1, 0, 128:] = True
    else:
        reached[1, 0] = True
    if precision == "int8" and name == "q":
        rest = found[1, 0, :128], expected[1, 0, :128]
        assert (rest[0] - rest[1]).norm() < 0.05 * rest[1].norm()
        reached[1, 0] = True
    assert torch.equal(found[~reached], expected[~reached])
    if name == "v":
        assert (~torch.isfinite(found[1, 0])).any(dim=-1).all()
    if precision == "16bit" and name == "q":
        rows = [row for row in range(200) if row != 130]
        assert torch.isfinite(found[1, 0, rows]).all()
    if precision == "16bit" and name == "v":
        channels = [channel for channel in range(32) if channel != 3]
        assert torch.equal(found[1, 0][:, channels], expected[1, 0][:, channels])


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize("name", ["q", "k", "proj_q"])
def test_a_selection_under_nan_names_every_block_once_and_none_outside(unread, name, value):
    """What is out of range here is an illegal memory access on a GPU."""
    inputs = make(heads=2, keys=700)
    inputs.proj_q = torch.eye(32).repeat(2, 1, 1)
    if name == "proj_q":
        inputs.proj_q[0, 1, 2] = value
    else:
        getattr(inputs, name)[0, 0, 130, 3] = value
    found = select_key_blocks(inputs.q, inputs.k, inputs.proj_q, None, sparsity=0.6, backend=BACKEND)
    assert found.shape[-1] == 4 and found.min() >= 0 and found.max() < 11
    assert (found.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_nan_in_one_heads_ratio_stays_in_that_head(unread, precision):
    clean, spoilt = make(heads=2, knots=2), make(heads=2, knots=2)
    spoilt.alpha[1, 0] = NAN
    expected, found = run(clean, precision), run(spoilt, precision)
    assert torch.equal(found[:, 0], expected[:, 0]) and found[:, 1].isnan().any()


def outliers(x):
    x.q[..., 3] *= 1e3
    x.k[..., 5] *= 1e3
    x.v[:, :, ::50] *= 1e3


def one_huge_key(x):
    x.k[:, :, 77] = 1e4


def equal_keys(x):
    x.k[:] = x.k[:, :, :1]


def one_hot_values(x):
    x.v.zero_()
    tokens = torch.arange(x.v.shape[2])
    x.v[:, :, tokens, tokens % x.v.shape[3]] = 1


def all_zero(x):
    for tensor in (x.q, x.k, x.v):
        tensor.zero_()


def zero_values_and_queries(x):
    x.q.zero_()
    x.v.zero_()


def dead_channels(x):
    for tensor in (x.q, x.k, x.v):
        tensor[..., ::2] = 0


def subnormal(x):
    smallest = 2.0**-24 if x.q.dtype == torch.float16 else 2.0**-140
    for tensor in (x.q, x.k, x.v):
        tensor.copy_(tensor.sign() * smallest)


def largest_float16(x):
    """Products and sums that float16 cannot hold."""
    x.q.copy_(x.q.sign() * 3e2)
    x.k.copy_(x.k.sign() * 3e2)
    x.v.copy_(x.v.sign() * 6e4)


def one_repeated_token(x):
    for tensor in (x.q, x.k, x.v):
        tensor[:] = tensor[:, :, :1]


HARD = [
    outliers,
    one_huge_key,
    equal_keys,
    one_hot_values,
    all_zero,
    zero_values_and_queries,
    dead_channels,
    subnormal,
    largest_float16,
    one_repeated_token,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("change", HARD, ids=lambda change: change.__name__)
def test_hard_inputs_stay_inside_the_values(change, precision, dtype):
    """Output inside the hull of V per channel: at 16 bit up to rounding, at low bit up to that of V's blocks."""
    inputs = make(dtype=dtype)
    change(inputs)
    out, share = run(inputs, precision, return_alpha=True)
    assert torch.isfinite(out).all() and ((share >= 0) & (share <= 1)).all()
    rounding = {"16bit": 2e-3 if dtype == torch.float16 else 1e-5}.get(precision, 0.08)
    slack = rounding * inputs.v.abs().max().float() + 1e-30
    assert (out.float() <= inputs.v.amax(dim=2, keepdim=True).float() + slack).all()
    assert (out.float() >= inputs.v.amin(dim=2, keepdim=True).float() - slack).all()


@pytest.mark.parametrize("change", HARD, ids=lambda change: change.__name__)
def test_gradients_of_hard_inputs_are_finite(change):
    inputs = make(tokens=130, keys=200)
    change(inputs)
    leaves = [tensor.requires_grad_() for tensor in (inputs.q, inputs.k, inputs.v)]
    run(inputs).sum().backward()
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)


def apart(x, sharpness):
    """Every other query and all keys are sharp in other channels: there phi(q) phi(k) is exp(-sharpness)."""
    x.q[:, :, ::2, 5] += 300
    sign = (torch.arange(x.k.shape[2]) % 2 * 2 - 1).to(x.k.dtype)
    x.k[..., 3] += sharpness * sign
    x.k[..., 4] -= sharpness * sign


# the linear branch has weight; float32 still holds it; its inverse squared is infinite; its inverse is; it is 0
APART = [30, 40, 60, 95, 300]


@pytest.mark.parametrize("estimated", [False, True], ids=["learned", "estimated"])
@pytest.mark.parametrize("sharpness", APART)
def test_a_linear_branch_without_weight_leaves_the_ratio_1(sharpness, estimated):
    """Output, ratio and every gradient are the definition's, which keeps to one rule."""
    inputs = make(tokens=130, keys=200)
    apart(inputs, sharpness)
    blocks = select_key_blocks(inputs.q, inputs.k, sparsity=0.5, backend=BACKEND)
    weight = torch.randn(inputs.q.shape, generator=torch.Generator().manual_seed(1))
    results = []
    for double in (False, True):
        tensors = [inputs.q, inputs.k, inputs.v, *([] if estimated else [torch.tensor([0.3])])]
        q, k, v, *alpha = leaves = [(t.double() if double else t.clone()).requires_grad_() for t in tensors]
        options = {"alpha": alpha[0] if alpha else None, "key_blocks": blocks}
        if double:
            out, share = sla2_reference(q, k, v, **options)
        else:
            options |= {"precision": "16bit", "backend": BACKEND, "return_alpha": True}
            out, share = sla2_attention(q, k, v, **options)
        grads = torch.autograd.grad((out * weight).sum(), leaves)
        results.append([out, share, *grads])
    found, expected = results
    if not estimated:
        assert torch.equal(expected[1] == 1, (sharpness > 40) & (torch.arange(130) % 2 == 0).expand(1, 1, -1))
    for name, ours, theirs in zip(("out", "share", "dq", "dk", "dv", "dalpha"), found, expected, strict=False):
        assert relative_error(ours, theirs) < 1e-3, name


@pytest.mark.parametrize("alpha", [None, 0.3, 1.0])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("sharpness", [60, 300])
def test_a_linear_branch_without_weight_at_every_precision(sharpness, precision, alpha):
    inputs = make(tokens=130, keys=200)
    apart(inputs, sharpness)
    inputs.alpha = None if alpha is None else torch.tensor([alpha])
    inputs.v.fill_(1)
    out, share = run(inputs, precision, return_alpha=True)
    assert (out - 1).abs().max() < (1e-5 if precision == "16bit" else 0.07)
    assert (share[:, :, ::2] == 1).all()


@pytest.mark.parametrize("offset", [0, 500])
def test_log_sum_exp_beyond_1e5(offset):
    """Logits of 2e5: exp(S) must never be taken, only exp(S - m)."""
    inputs = make()
    inputs.q *= 3e2
    inputs.k *= 3e2
    inputs.k += offset
    logits = inputs.q @ (inputs.k - inputs.k.mean(dim=2, keepdim=True)).transpose(2, 3) * 32**-0.5
    assert logits.abs().max() > 1e5
    blocks = select_key_blocks(inputs.q, inputs.k, sparsity=0.5, backend=BACKEND)
    out, share = run(inputs, key_blocks=blocks, return_alpha=True)
    expected, expected_share = sla2_reference(inputs.q, inputs.k, inputs.v, key_blocks=blocks)
    # a float32 logit of 2e5 is known to 0.01: what is compared is an average whose weights are as exact as that
    assert torch.isfinite(out).all() and relative_error(out, expected) < 0.05
    assert (share - expected_share).abs().max() < 0.05


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("alpha", [0.0, 1e-38, 1e-7, 1 - 6e-8, 1.0])
def test_extreme_ratios(alpha, precision):
    inputs = make(heads=2)
    inputs.alpha = torch.full((2,), alpha)
    out, share = run(inputs, precision, return_alpha=True)
    blocks = select_key_blocks(inputs.q, inputs.k, sparsity=0.5, backend=BACKEND)
    expected, _ = inputs.reference(blocks)
    assert torch.equal(share, inputs.alpha[None, :, None].expand_as(share))
    assert relative_error(out, expected) < (1e-5 if precision == "16bit" else 0.12)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_heads_and_videos_may_change_places(precision):
    inputs = make(batch=2, heads=3, tokens=140, keys=140)
    whole = run(inputs, precision)
    heads, batch = [2, 0, 1], [1, 0]
    for name in ("q", "k", "v"):
        setattr(inputs, name, getattr(inputs, name)[batch][:, heads])
    assert torch.equal(run(inputs, precision), whole[batch][:, heads])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sparsity_0_is_dense_attention(dtype):
    inputs = make(dtype=dtype, knots=3)
    dense = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in inputs.tensors()[:3]))
    assert relative_error(run(inputs, sparsity=0.0), dense) < (1e-5 if dtype == torch.float32 else 2e-3)


def test_the_error_grows_with_the_sparsity_on_average():
    errors = []
    for sparsity in (0.0, 0.5, 0.75, 0.9):
        found = []
        for seed in range(1 if interpreting() else 4):
            inputs = make(seed, tokens=256, keys=1280)
            dense = torch.nn.functional.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v)
            found.append(relative_error(run(inputs, sparsity=sparsity), dense))
        errors.append(sum(found) / len(found))
    assert errors == sorted(errors) and errors[0] < 1e-4 < errors[1]


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(data=st.data(), count=st.integers(1, 40))
def test_a_repaired_selection_holds_what_was_named_and_nothing_twice(data, count):
    rows = data.draw(st.lists(st.integers(-5, count + 5), min_size=1, max_size=count))
    found = distinct_blocks(torch.tensor([[[rows]]], dtype=torch.int32), count).flatten().tolist()
    assert found == sorted(set(found)) and len(found) == len(rows)
    assert {min(max(row, 0), count - 1) for row in rows} <= set(found) <= set(range(count))


@pytest.mark.parametrize("given_blocks", [[1, 1, 3], [4, 4, 4], [-9, 0, 99], [3, 1, 1]])
def test_a_repeated_or_foreign_key_block_where_no_check_can_see_it(given_blocks):
    """As on a GPU: the operator behind sla2_attention's checks. No block is attended twice."""
    inputs = make()
    blocks = torch.tensor(given_blocks, dtype=torch.int32).expand(1, 1, 2, 3)
    rest = 0.5, "16bit", True, 32**-0.5, BACKEND
    out, _, used = torch.ops.sla2.attention(inputs.q, inputs.k, inputs.v, None, None, None, blocks, *rest)
    used = used.view_as(blocks)
    assert (used.diff(dim=-1) > 0).all()
    expected, _ = inputs.reference(used)
    assert relative_error(out, expected) < 1e-5


@pytest.mark.parametrize("size", [1, 2])
def test_arguments_of_one(size):
    """Triton makes a constant of an integer argument that is 1: one token, one head, one block, one knot."""
    inputs = make(batch=size, heads=size, tokens=size, keys=size, knots=size)
    expected, _ = inputs.reference(select_key_blocks(inputs.q, inputs.k, sparsity=0.5, backend=BACKEND))
    assert relative_error(run(inputs), expected) < 1e-5


def test_strides_that_no_32_bit_number_holds():
    """Heads 2^31 elements apart: memory that is reserved, of which a few pages are touched."""
    apart = 2**31 + 64
    inputs = make(heads=2, tokens=70, keys=70)
    views = []
    for tensor in (inputs.q, inputs.k, inputs.v):
        storage = torch.empty_strided((apart + 70 * 32,), (1,), dtype=torch.float16)
        view = storage.as_strided((1, 2, 70, 32), (2 * apart, apart, 32, 1))
        view.copy_(tensor)
        views.append(view)
    copies = [view.contiguous() for view in views]
    options = {"sparsity": 0.5, "precision": "16bit", "backend": BACKEND}
    assert torch.equal(sla2_attention(*views, **options), sla2_attention(*copies, **options))
    assert math.isfinite(float(views[0].float().sum()))
