"""Whatever does not fit is refused with one sentence that names it and says what is expected."""

import pytest
import torch

from sla2_kernels import select_key_blocks, sla2_attention


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
    "sparsity 1": ({"sparsity": 1.0}, "sparsity must be at least 0 and below 1, got 1.0."),
    "sparsity below 0": ({"sparsity": -0.1}, "sparsity must be at least 0 and below 1, got -0.1."),
    "sparsity in percent": ({"sparsity": 97}, "sparsity must be at least 0 and below 1, got 97."),
    "sparsity NaN": ({"sparsity": float("nan")}, "sparsity must be at least 0 and below 1, got nan."),
    "scale 0": ({"scale": 0.0}, "scale must be a finite number above 0, got 0.0."),
    "scale infinite": ({"scale": float("inf")}, "scale must be a finite number above 0, got inf."),
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
    "integers": (tensors(dtype=torch.int32), "q, k and v must be float16, bfloat16, float32 or float64, got torch.int32."),
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
    "alpha of other heads": ({"alpha": torch.full((2,), 0.5)}, "alpha must be (3,) or (3, knots), got (2,)."),
    "alpha a number": ({"alpha": torch.tensor(0.5)}, "alpha must be (3,) or (3, knots), got ()."),
    "alpha without knots": ({"alpha": torch.ones(3, 0)}, "alpha must be (3,) or (3, knots), got (3, 0)."),
    "key_blocks not integers": (
        {"key_blocks": torch.zeros(2, 3, 2, 1)},
        "key_blocks must be int32 or int64, got torch.float32.",
    ),
    "key_blocks of other rows": (
        {"key_blocks": blocks(2, 3, 3, 1)},
        "key_blocks must be (2, 3, 2) x n with n from 1 to 4, got (2, 3, 3, 1).",
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
}  # fmt: skip


@pytest.mark.parametrize(("change", "sentence"), CASES.values(), ids=CASES)
def test_sentence(change, sentence):
    arguments = {**tensors(), "sparsity": 0.5, **change}
    with pytest.raises(ValueError) as caught:
        sla2_attention(**arguments)
    assert str(caught.value) == sentence


SELECTION = {
    name: case for name, case in CASES.items() if not set(case[0]) & {"precision", "scale", "alpha", "key_blocks"}
    and set(case[0]) != {"v"}
}  # fmt: skip


@pytest.mark.parametrize(("change", "sentence"), SELECTION.values(), ids=SELECTION)
def test_the_selection_refuses_the_same(change, sentence):
    arguments = {**tensors(), "sparsity": 0.5, **change}
    arguments.pop("v")
    with pytest.raises(ValueError) as caught:
        select_key_blocks(**arguments)
    assert str(caught.value) == sentence


def test_an_explicit_triton_never_falls_back(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        ValueError, match=r"^sla2_attention cannot run: the Triton kernels need an NVIDIA GPU, and .*CPU\.$"
    ):
        sla2_attention(**tensors(), backend="triton")


@pytest.mark.parametrize("change", [{}, {"layout": "BHND"}, {"alpha": torch.full((3, 9), 0.5)}, {"scale": 1}])
def test_the_good_call_is_good(change):
    assert torch.isfinite(sla2_attention(**{**tensors(), "sparsity": 0.5, **change})).all()
