"""Whatever does not fit is refused with one sentence that names it and says what is expected."""

import numpy
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from sla2_kernels import arguments, select_key_blocks, sla2_attention
from sla2_kernels.fitted_attention import fitted_attention, sample_rows
from sla2_kernels.forced_blocks import select_with_forced_blocks
from sla2_kernels.pool_routing import PoolRouting
from sla2_kernels.sequence_parallel import sequence_parallel_attention
from sla2_kernels.sla_v1 import sla_attention
from sla2_kernels.video_attention import video_attention, why_dense


def tensors(batch=2, heads=3, tokens=130, keys=200, head_dim=16, dtype=torch.float32):
    q = torch.ones(batch, heads, tokens, head_dim, dtype=dtype)
    k = torch.ones(batch, heads, keys, head_dim, dtype=dtype)
    return {"q": q, "k": k, "v": k.clone()}


def blocks(*shape, dtype=torch.int32):
    return torch.arange(shape[-1], dtype=dtype).expand(shape)


# changes to a good call, and what the sentence says; {} and () are escaped by the test
CASES = {
    "layout": ({"layout": "NHD"}, 'layout must be "BHND" or "BNHD", got \'NHD\'.'),
    "precision": ({"precision": "int4"}, 'precision must be "16bit", "int8" or "fp8", got \'int4\'.'),
    "backend": ({"backend": "cuda"}, 'backend must be "auto", "triton" or "torch", got \'cuda\'.'),
    "query_block 32": ({"query_block": 32}, "query_block must be 128 or 64, got 32."),
    "query_block of two": (
        {"query_block": torch.tensor([64, 64])},
        "query_block must be 128 or 64, got a tensor of shape (2,).",
    ),
    "sparsity 1": ({"sparsity": 1.0}, "sparsity must be at least 0 and below 1, got 1.0."),
    "sparsity below 0": ({"sparsity": -0.1}, "sparsity must be at least 0 and below 1, got -0.1."),
    "sparsity in percent": ({"sparsity": 97}, "sparsity must be at least 0 and below 1, got 97."),
    "sparsity NaN": ({"sparsity": float("nan")}, "sparsity must be at least 0 and below 1, got nan."),
    "sparsity None": ({"sparsity": None}, "sparsity must be at least 0 and below 1, got None."),
    "sparsity text": ({"sparsity": "0.5"}, "sparsity must be at least 0 and below 1, got '0.5'."),
    "sparsity a list": ({"sparsity": [0.5]}, "sparsity must be at least 0 and below 1, got [0.5]."),
    "sparsity of two": (
        {"sparsity": torch.tensor([0.5, 0.6])},
        "sparsity must be at least 0 and below 1, got a tensor of shape (2,).",
    ),
    "room 3": ({"room": 3}, "room must be two integers, at the start and at the end, got 3."),
    "room of halves": ({"room": (0.5, 0)}, "room must be an integer, got 0.5."),
    "room of a flag": ({"room": (True, 0)}, "room must be an integer, got True."),
    "room below 0": ({"room": (0, -1)}, "room must be two integers of at least 0, got 0 and -1."),
    "more exact keys than keys": (
        {"exact_keys": (150, 51)},
        "exact_keys must be at most 200 together, got 150 and 51.",
    ),
    "scale text": ({"scale": "0.5"}, "scale must be a finite number above 0, got '0.5'."),
    "scale of two": ({"scale": torch.ones(2)}, "scale must be a finite number above 0, got a tensor of shape (2,)."),
    "scale without a value": (
        {"scale": torch.ones((), device="meta")},
        "scale must be a finite number above 0, got tensor(..., device='meta', size=()).",
    ),
    "scale 0": ({"scale": 0.0}, "scale must be a finite number above 0, got 0.0."),
    "scale infinite": ({"scale": float("inf")}, "scale must be a finite number above 0, got inf."),
    "q None": ({"q": None}, "q must be a tensor of 4 dimensions (BHND), got None."),
    "k an array": (
        {"k": numpy.ones((2, 3, 200, 16), "f")},
        "k must be a tensor of 4 dimensions (BHND), got a ndarray.",
    ),
    "q sparse": (
        {"q": torch.ones(2, 3, 130, 16).to_sparse()},
        "q must be a dense tensor, got layout torch.sparse_coo: call to_dense() or pad it.",
    ),
    "q nested": (
        {"q": torch.nested.nested_tensor([torch.ones(3, 130, 16), torch.ones(3, 90, 16)])},
        "q must be a dense tensor, got a nested tensor: call to_dense() or pad it.",
    ),
    "q of 3 dimensions": ({"q": torch.ones(3, 130, 16)}, "q must have 4 dimensions (BHND), got shape (3, 130, 16)."),
    "v of 2 dimensions": ({"v": torch.ones(200, 16)}, "v must have 4 dimensions (BHND), got shape (200, 16)."),
    "k in another dtype": (
        {"k": torch.ones(2, 3, 200, 16).half()},
        "q, k and v must share one dtype and device; q is torch.float32 on cpu, k is torch.float16 on cpu.",
    ),
    "v on another device": (
        {"v": torch.ones(2, 3, 200, 16, device="meta")},
        "q, k and v must share one dtype and device; q is torch.float32 on cpu, v is torch.float32 on meta.",
    ),
    "no tokens": ({"q": torch.ones(2, 3, 0, 16)}, "q is empty: shape (2, 3, 0, 16)."),
    "no keys": ({"k": torch.ones(2, 3, 0, 16)}, "k is empty: shape (2, 3, 0, 16)."),
    "integers": (
        tensors(dtype=torch.int32),
        "q, k and v must be float16, bfloat16, float32 or float64, got torch.int32.",
    ),
    "FP8 inputs": (
        tensors(dtype=torch.float8_e4m3fn),
        "q, k and v must be float16, bfloat16, float32 or float64, got torch.float8_e4m3fn.",
    ),
    "k and v differ": (
        {"v": torch.ones(2, 3, 199, 16)},
        "k and v must have one shape, got (2, 3, 200, 16) and (2, 3, 199, 16).",
    ),
    "heads differ": (
        {"q": torch.ones(2, 4, 130, 16)},
        "q and k must agree in batch, heads and head_dim (BHND), got (2, 4, 130, 16) and (2, 3, 200, 16).",
    ),
    "heads differ in BNHD": (
        {"layout": "BNHD"},
        "q and k must agree in batch, heads and head_dim (BNHD), got (2, 3, 130, 16) and (2, 3, 200, 16).",
    ),
    "head_dim differs": (
        {"q": torch.ones(2, 3, 130, 32)},
        "q and k must agree in batch, heads and head_dim (BHND), got (2, 3, 130, 32) and (2, 3, 200, 16).",
    ),
    "proj_q of another width": ({"proj_q": torch.eye(32)}, "proj_q must be (16, 16) or (3, 16, 16), got (32, 32)."),
    "proj_k of other heads": (
        {"proj_k": torch.ones(2, 16, 16)},
        "proj_k must be (16, 16) or (3, 16, 16), got (2, 16, 16).",
    ),
    "proj_q a list": ({"proj_q": [1.0]}, "proj_q must be a tensor (16, 16) or (3, 16, 16), got [1.0]."),
    "proj_q complex": (
        {"proj_q": torch.eye(16, dtype=torch.complex64)},
        "proj_q must hold real numbers, got torch.complex64.",
    ),
    "proj_k with NaN": (
        {"proj_k": torch.full((16, 16), float("nan"))},
        "proj_k must hold finite numbers, but NaN or infinity is among them.",
    ),
    "proj_q without values": (
        {"proj_q": torch.eye(16, device="meta")},
        "proj_q must hold values, but lies on the meta device: load it first.",
    ),
    "proj_q with infinities that cancel": (
        {"proj_q": torch.eye(16).index_fill(0, torch.tensor(3), -float("inf"))},
        "proj_q must hold finite numbers, but NaN or infinity is among them.",
    ),
    "alpha a float": ({"alpha": 0.5}, "alpha must be a tensor (3,) or (3, knots), got 0.5."),
    "alpha a list": ({"alpha": [0.5] * 3}, "alpha must be a tensor (3,) or (3, knots), got [0.5, 0.5, 0.5]."),
    "alpha an array": ({"alpha": numpy.full(99, 0.5)}, "alpha must be a tensor (3,) or (3, knots), got a ndarray."),
    "alpha complex": ({"alpha": torch.ones(3) * 0.5j}, "alpha must hold real numbers, got torch.complex64."),
    "alpha without values": (
        {"alpha": torch.ones(3, device="meta")},
        "alpha must hold values, but lies on the meta device: load it first.",
    ),
    "alpha above 1": ({"alpha": torch.tensor([0.5, 1.5, 0.5])}, "alpha must lie in 0 to 1, but 1.5 is among it."),
    "alpha below 0": ({"alpha": torch.tensor([0.5, 0.5, -2.0])}, "alpha must lie in 0 to 1, but -2 is among it."),
    "alpha NaN": ({"alpha": torch.tensor([0.5, float("nan"), 0])}, "alpha must lie in 0 to 1, but nan is among it."),
    "alpha of other heads": ({"alpha": torch.full((2,), 0.5)}, "alpha must be (3,) or (3, knots), got (2,)."),
    "alpha a number": ({"alpha": torch.tensor(0.5)}, "alpha must be (3,) or (3, knots), got ()."),
    "alpha without knots": ({"alpha": torch.ones(3, 0)}, "alpha must be (3,) or (3, knots), got (3, 0)."),
    "key_blocks a list": (
        {"key_blocks": [[[[0]]]]},
        "key_blocks must be a tensor of int32 or int64, (2, 3, 2) x n, got [[[[0]]]].",
    ),
    "key_blocks an array": (
        {"key_blocks": numpy.zeros((2, 3, 2, 1), "i")},
        "key_blocks must be a tensor of int32 or int64, (2, 3, 2) x n, got a ndarray.",
    ),
    "key_blocks not integers": (
        {"key_blocks": torch.zeros(2, 3, 2, 1)},
        "key_blocks must be int32 or int64, got torch.float32.",
    ),
    "key_blocks of other rows": (
        {"key_blocks": blocks(2, 3, 3, 1)},
        "key_blocks must be (2, 3, 2) x n with n from 1 to 4, got (2, 3, 3, 1).",
    ),
    "key_blocks of 128 query tokens": (
        {"key_blocks": blocks(2, 3, 2, 1), "query_block": 64},
        "key_blocks must be (2, 3, 3) x n with n from 1 to 4, got (2, 3, 2, 1).",
    ),
    "no key_blocks": (
        {"key_blocks": blocks(2, 3, 2, 0)},
        "key_blocks must be (2, 3, 2) x n with n from 1 to 4, got (2, 3, 2, 0).",
    ),
    "too many key_blocks": (
        {"key_blocks": blocks(2, 3, 2, 5)},
        "key_blocks must be (2, 3, 2) x n with n from 1 to 4, got (2, 3, 2, 5).",
    ),
    "key_blocks below 0": ({"key_blocks": blocks(2, 3, 2, 2) - 1}, "key_blocks must lie in 0 to 3."),
    "key_blocks too high": ({"key_blocks": blocks(2, 3, 2, 2) + 3}, "key_blocks must lie in 0 to 3."),
    "key_blocks on another device": (
        {"key_blocks": blocks(2, 3, 2, 1).to("meta")},
        "key_blocks must lie on q's device cpu, got meta.",
    ),
    "a key block twice": (
        {"key_blocks": torch.ones(2, 3, 2, 2, dtype=torch.int64)},
        "key_blocks must not name a key block twice for one query block.",
    ),
}


@pytest.mark.parametrize(("change", "sentence"), CASES.values(), ids=CASES)
def test_sentence(change, sentence):
    arguments = {**tensors(), "sparsity": 0.5, **change}
    with pytest.raises(ValueError) as caught:
        sla2_attention(**arguments)
    assert str(caught.value) == sentence


FITTED = {
    "nothing left out": (
        {"sparsity": 0.0},
        "a fitted ratio needs a key block that is left out, and 4 of 4 are selected.",
    ),
    "rows of int64": (
        {"rows": torch.arange(32)},
        "rows must be int32 (R,), R a power of two from 16, got int64 (32,).",
    ),
    "8 rows": (
        {"rows": torch.arange(8, dtype=torch.int32)},
        "rows must be int32 (R,), R a power of two from 16, got int32 (8,).",
    ),
    "no row fits": ({"fitted": 0}, "fitted must lie between 1 and the 32 rows, got 0."),
    "more fit than there are": ({"fitted": 33}, "fitted must lie between 1 and the 32 rows, got 33."),
    "a fraction of a row fits": ({"fitted": 2.5}, "fitted must be an integer, got 2.5."),
    "a row behind the last one": (
        {"rows": torch.arange(99, 131, dtype=torch.int32)},
        "rows must lie in 0 to 129, but 130 is among them.",
    ),
    "a row before the first one": (
        {"rows": torch.arange(-1, 31, dtype=torch.int32)},
        "rows must lie in 0 to 129, but -1 is among them.",
    ),
    "rows on another device": (
        {"rows": torch.arange(32, dtype=torch.int32, device="meta")},
        "rows must lie on q's device cpu, got meta.",
    ),
    "layout": CASES["layout"],
    "precision": CASES["precision"],
    "proj_q without values": CASES["proj_q without values"],
    "room": CASES["room 3"],
    "query_block 32": CASES["query_block 32"],
}


@pytest.mark.parametrize(("change", "sentence"), FITTED.values(), ids=FITTED)
def test_the_fitted_ratio_refuses(change, sentence):
    arguments = {**tensors(), "sparsity": 0.5, "rows": sample_rows(130, 0), **change}
    with pytest.raises(ValueError) as caught:
        fitted_attention(**arguments)
    assert str(caught.value) == sentence


SELECTION = {
    name: case
    for name, case in CASES.items()
    if not set(case[0]) & {"precision", "scale", "alpha", "key_blocks", "room", "exact_keys"} and set(case[0]) != {"v"}
}


@pytest.mark.parametrize(("change", "sentence"), SELECTION.values(), ids=SELECTION)
def test_the_selection_refuses_the_same(change, sentence):
    arguments = {**tensors(), "sparsity": 0.5, **change}
    arguments.pop("v")
    with pytest.raises(ValueError) as caught:
        select_key_blocks(**arguments)
    assert str(caught.value) == sentence


# k has 200 tokens
FORCED = {
    "layout": ({"layout": "BDHN"}, 'layout must be "BHND" or "BNHD", got \'BDHN\'.'),
    "backend": ({"backend": "cuda"}, 'backend must be "auto", "triton" or "torch", got \'cuda\'.'),
    "query_block 32": CASES["query_block 32"],
    "front 1.5": ({"front": 1.5}, "front must be an integer, got 1.5."),
    "back text": ({"back": "10"}, "back must be an integer, got '10'."),
    "sparsity None": ({"sparsity": None}, "sparsity must be at least 0 and below 1, got None."),
    "sparsity with nothing free": (
        {"front": 200, "sparsity": 2},
        "sparsity must be at least 0 and below 1, got 2.",
    ),
    "q of 3 dimensions": ({"q": torch.ones(3, 130, 16)}, "q must have 4 dimensions (BHND), got shape (3, 130, 16)."),
    "proj_q of another width": ({"proj_q": torch.eye(8)}, "proj_q must be (16, 16) or (3, 16, 16), got (8, 8)."),
}


@pytest.mark.parametrize(("change", "sentence"), FORCED.values(), ids=FORCED)
def test_a_selection_with_forced_blocks_refuses(change, sentence):
    arguments = {**tensors(), "sparsity": 0.5, **change}
    arguments.pop("v")
    with pytest.raises(ValueError) as caught:
        select_with_forced_blocks(**arguments)
    assert str(caught.value) == sentence


VIDEO = {
    **{
        name: FORCED[name]
        for name in (
            "layout",
            "backend",
            "query_block 32",
            "front 1.5",
            "back text",
            "sparsity None",
            "q of 3 dimensions",
        )
    },
    "precision": ({"precision": "int4"}, 'precision must be "auto", "16bit", "int8" or "fp8", got \'int4\'.'),
    "k None": ({"k": None}, "k must be a tensor of 4 dimensions (BHND), got None."),
    "v without tokens": ({"v": torch.ones(2, 3, 0, 16)}, "v is empty: shape (2, 3, 0, 16)."),
    "proj_l a tensor": (
        {"method": "sla", "proj_l": torch.eye(16)},
        "proj_l must be a pair (weight, bias) of tensors, got a tensor of shape (16, 16).",
    ),
    "proj_l of another width": (
        {"method": "sla", "proj_l": (torch.eye(8), torch.ones(8))},
        "proj_l's weight must be (16, 16), got (8, 8).",
    ),
    "proj_l without values": (
        {"method": "sla", "proj_l": (torch.eye(16), torch.ones(16, device="meta"))},
        "proj_l's bias must hold values, but lies on the meta device: load it first.",
    ),
    "proj_l with NaN": (
        {"method": "sla", "proj_l": (torch.eye(16), torch.full((16,), float("nan")))},
        "proj_l's bias must hold finite numbers, but NaN or infinity is among them.",
    ),
}


@pytest.mark.parametrize(("change", "sentence"), VIDEO.values(), ids=VIDEO)
def test_video_attention_refuses(change, sentence):
    with pytest.raises(ValueError) as caught:
        video_attention(**{**tensors(tokens=200), "precision": "16bit", **change})
    assert str(caught.value) == sentence


@pytest.mark.parametrize(("change", "sentence"), [FORCED["layout"], FORCED["q of 3 dimensions"]])
def test_sla_attention_and_why_dense_refuse(change, sentence):
    arguments = {**tensors(), **change}
    for call in (
        lambda: sla_attention(**arguments, proj_l=None),
        lambda: why_dense(arguments["q"], layout=change.get("layout", "BHND")),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value) == sentence


PARALLEL = {
    "q of 3 dimensions": ({"q": torch.ones(3, 130, 16)}, "q must have 4 dimensions (BNHD), got shape (3, 130, 16)."),
    "v in another dtype": (
        {"v": torch.ones(2, 3, 130, 16).half()},
        "q, k and v must share one dtype and device; q is torch.float32 on cpu, v is torch.float16 on cpu.",
    ),
    "other keys": (
        {"k": torch.ones(2, 9, 130, 16), "v": torch.ones(2, 9, 130, 16)},
        "q, k and v must have one shape, got (2, 3, 130, 16), (2, 9, 130, 16), (2, 9, 130, 16).",
    ),
    "a projection of another width": (
        {"routing": PoolRouting(0.5, torch.eye(8))},
        "proj_q must be (16, 16) or (130, 16, 16), got (8, 8).",
    ),
}


@pytest.mark.parametrize(("change", "sentence"), PARALLEL.values(), ids=PARALLEL)
def test_attention_of_several_processes_refuses(change, sentence):
    """Before anything is sent: the other processes would wait for ever."""
    with pytest.raises(ValueError) as caught:
        sequence_parallel_attention(**{**tensors(keys=130), **change}, attend=None)
    assert str(caught.value) == sentence


def test_attention_of_several_processes_refuses_what_attend_returns(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        with pytest.raises(
            ValueError, match=r"^attend\(\) must return its q's shape \(2, 3, 130, 16\), got \(2, 130, 3, 16\)"
        ):
            sequence_parallel_attention(**tensors(keys=130), attend=lambda q, k, v, heads: q.transpose(1, 2))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("change", ["sparsity 97", "backend", "query_block 32"])
def test_a_routing_of_several_processes_refuses_the_same(change):
    arguments, sentence = {**CASES, "sparsity 97": CASES["sparsity in percent"]}[change]
    with pytest.raises(ValueError) as caught:
        PoolRouting(**{"sparsity": 0.5, **arguments})
    assert str(caught.value) == sentence


@pytest.mark.parametrize("sparsity", [None, "auto", 1.0])
def test_sparsity_is_ignored_with_key_blocks(sparsity):
    arguments = {**tensors(), "key_blocks": blocks(2, 3, 2, 2)}
    assert torch.equal(sla2_attention(**arguments, sparsity=sparsity), sla2_attention(**arguments))


@pytest.mark.parametrize("sparsity", [0, numpy.float32(0.5), torch.tensor(0.5), torch.tensor([0.5]), numpy.array(0.5)])
def test_numbers_of_any_type_are_numbers(sparsity):
    expected = sla2_attention(**tensors(), sparsity=float(sparsity), scale=2.0)
    assert torch.equal(sla2_attention(**tensors(), sparsity=sparsity, scale=numpy.int64(2)), expected)


def test_contents_on_a_gpu_are_not_read():
    """Reading them would wait for the GPU. A meta tensor raises where its contents are read."""
    q = torch.ones(1, 3, 130, 16, device="meta")
    weights = {"proj_q": torch.eye(16, device="meta"), "alpha": torch.full((3, 2), 0.5, device="meta")}
    key_blocks = torch.zeros(1, 3, 2, 1, dtype=torch.int32, device="meta")
    assert sla2_attention(q, q, q, **weights, key_blocks=key_blocks, backend="torch").shape == q.shape


def test_contents_are_not_read_where_they_are_traced_faked_or_batched():
    weights = torch.eye(16), torch.full((3,), 0.5)

    def call(proj_q, alpha):
        x = torch.ones(1, 3, 130, 16)
        return sla2_attention(x, x, x, proj_q, alpha=alpha)

    expected = call(*weights)
    batched = torch.vmap(call)(torch.eye(16).expand(2, -1, -1), torch.full((2, 3), 0.5))
    assert torch.equal(batched, expected.expand(2, *expected.shape))
    assert torch.equal(make_fx(call)(*weights)(*weights), expected)
    with FakeTensorMode():
        assert call(torch.eye(16), torch.full((3,), 0.5)).shape == expected.shape
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert call(*weights).shape == expected.shape


def test_a_sum_that_overflows_is_no_infinity():
    arguments.check_projections(torch.full((16, 16), 3e38), None, torch.empty(1, 3, 8, 16), "BHND")


def test_an_explicit_triton_never_falls_back(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        ValueError, match=r"^sla2_attention cannot run: the Triton kernels need an NVIDIA GPU, and .*CPU\.$"
    ):
        sla2_attention(**tensors(), backend="triton")


@pytest.mark.parametrize("change", [{}, {"layout": "BHND"}, {"alpha": torch.full((3, 9), 0.5)}, {"scale": 1}])
def test_the_good_call_is_good(change):
    assert torch.isfinite(sla2_attention(**{**tensors(), "sparsity": 0.5, **change})).all()
