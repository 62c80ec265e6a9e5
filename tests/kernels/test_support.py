"""What runs where, and the one sentence why not: every reason, on cards that are made up here."""

import re
import sys
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from sla2_kernels import default_precision, query_blocks, support, unsupported_reason

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch):
    """card((8, 9)): an NVIDIA card of that compute capability with Triton installed."""

    def set_card(capability, hip=None):
        monkeypatch.setattr(support, "_cuda_capability", lambda index: capability)
        monkeypatch.setattr(support, "why_no_triton", lambda: None)
        monkeypatch.setattr(support, "triton_version", lambda: support.MIN_TRITON_ON_BLACKWELL)
        monkeypatch.setattr(torch.version, "hip", hip)

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return set_card


def triton_reason_anew(monkeypatch, version):
    """why_no_triton() with Triton of that version, or None for no Triton."""
    found = None if version is None else object()
    monkeypatch.setattr(support.importlib.util, "find_spec", lambda name: found)
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__=version))
    return support.why_no_triton.__wrapped__()


def assert_sentence(reason):
    assert "\n" not in reason and len(reason) < 400 and not reason.endswith(".")


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("precision", ["16bit", "int8"])
def test_supported(card, capability, dtype, head_dim, precision):
    card(capability)
    assert unsupported_reason(CUDA, dtype, head_dim, precision) is None
    assert support.resolve_backend("auto", CUDA, dtype, head_dim, precision).name == "triton"


# device, dtype, head_dim, precision, compute capability, hip; part of the sentence
REFUSED = {
    "CPU": (CPU, torch.float16, 64, "int8", (8, 9), None, "tensors are on the CPU"),
    "another device": (torch.device("mps"), torch.float16, 64, "int8", (8, 9), None, "on a mps device"),
    "AMD": (CUDA, torch.float16, 64, "int8", (9, 4), "6.0", "AMD card (ROCm)"),
    "Turing": (CUDA, torch.float16, 64, "int8", (7, 5), None, "8.0 (RTX 30, A100) or newer, and this card has 7.5"),
    "float64": (CUDA, torch.float64, 64, "16bit", (8, 9), None, "float16, bfloat16 and float32, not float64"),
    "head_dim": (CUDA, torch.float16, 96, "int8", (8, 9), None, "head_dim 32, 64 and 128, not 96"),
    "fp8 on an RTX 30": (CUDA, torch.float16, 64, "fp8", (8, 6), None, 'needs compute capability 8.9 (RTX 40) or newer, and this card has 8.6; use "int8"'),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refused_with_one_sentence(card, case):
    *call, capability, hip, part = case
    card(capability, hip)
    reason = unsupported_reason(*call, backend="triton")
    assert_sentence(reason)
    assert part in reason
    with pytest.raises(ValueError, match=f"^sla2_attention cannot run: {re.escape(reason)}\\.$"):
        support.resolve_backend("triton", *call)


def test_auto_falls_back_to_torch_but_never_for_fp8_on_a_card_without_it(card):
    card((8, 6))
    assert support.resolve_backend("auto", CUDA, torch.float64, 64, "16bit").name == "torch"
    assert support.resolve_backend("auto", CUDA, torch.float16, 80, "int8").name == "torch"
    with pytest.raises(ValueError, match='use "int8"'):
        support.resolve_backend("auto", CUDA, torch.float16, 64, "fp8")


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_torch_is_the_way_on_the_cpu(card, backend):
    card((8, 9))
    assert unsupported_reason("cpu", torch.float64, 80, "fp8", backend) is None
    assert support.resolve_backend(backend, CPU, torch.float64, 80, "fp8").name == "torch"
    assert unsupported_reason("cuda", torch.float64, 80, "fp8", "torch") is None


def test_without_triton_the_sentence_is_a_command(monkeypatch):
    reason = triton_reason_anew(monkeypatch, None)
    assert_sentence(reason)
    assert reason == f"Triton is not installed; install it with: {support.triton_install_command()}"


def test_an_old_triton_is_named(monkeypatch):
    reason = triton_reason_anew(monkeypatch, "3.1.0")
    assert reason.startswith("Triton 3.1.0 is too old (3.2 or newer is needed); update it with: ")


# releases, and as prereleases, PyTorch's nightly builds and triton-windows write themselves
VERSIONS = {
    "3.2.0": (3, 2, 0), "3.7.1": (3, 7, 1), "3.10.0+git123": (3, 10, 0), "4.0": (4, 0), "3.5.0rc1": (3, 5, 0),
    "3.4.0.dev20250601": (3, 4, 0), "3.3.0+git96316ce5": (3, 3, 0), "3.2.0.post10": (3, 2, 0), "3.6rc2": (3, 6),
}  # fmt: skip


@pytest.mark.parametrize("version", VERSIONS)
def test_newer_tritons_are_taken_however_their_version_is_written(monkeypatch, version):
    assert triton_reason_anew(monkeypatch, version) is None
    assert support.triton_version() == VERSIONS[version]


def test_a_version_that_is_no_number_is_named(monkeypatch):
    reason = triton_reason_anew(monkeypatch, "main")
    assert_sentence(reason)
    assert reason.startswith("Triton's version 'main' is no number; install a release with: ")


@pytest.mark.parametrize(
    "error",
    [
        ImportError("DLL load failed while importing libtriton: The specified module could not be found."),
        OSError("[WinError 126] The specified module could not be found"),
    ],
)
def test_a_triton_that_cannot_be_imported_is_a_reason(monkeypatch, error):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "triton":
                raise error

    monkeypatch.setattr(support.importlib.util, "find_spec", lambda name: object())
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    reason = support.why_no_triton.__wrapped__()
    assert_sentence(reason)
    assert reason.startswith(f"Triton is installed but cannot be imported ({type(error).__name__}: {error}); reinstall")


@pytest.mark.parametrize(
    ("torch_version", "platform", "package"),
    [
        ("2.6.0+cu124", "linux", '"triton==3.2.*"'),
        ("2.13.0", "linux", '"triton==3.7.*"'),
        ("2.99.0", "linux", "triton"),
        ("2.8.0", "win32", '"triton-windows==3.4.*"'),
        ("2.15.0", "win32", "triton-windows"),
    ],
)
def test_install_command_pins_what_belongs_to_torch(monkeypatch, torch_version, platform, package):
    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr(sys, "platform", platform)
    assert support.triton_install_command() == f"{sys.executable} -m pip install {package}"


@pytest.mark.parametrize(
    ("capability", "precision"),
    [((8, 0), "int8"), ((8, 9), "int8"), ((9, 0), "int8"), ((10, 0), "fp8"), ((10, 3), "fp8"), ((12, 0), "int8")],
)
def test_default_precision(card, capability, precision):
    card(capability)
    assert default_precision("cuda:0") == precision
    assert default_precision("cpu") == "16bit"


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_only_the_int8_loop_for_hopper_selects_for_every_64_query_tokens(card, capability, monkeypatch):
    hopper = pytest.importorskip("sla2_kernels.kernels.hopper")
    monkeypatch.setattr(hopper, "gluon_is_known", lambda: True)
    card(capability)

    def chosen(precision="int8", device=CUDA, dtype=torch.bfloat16, head_dim=128, spare=0):
        q = torch.empty(1, 300, 2, head_dim + spare, dtype=dtype)[..., :head_dim]
        kept = {name: getattr(q, name) for name in ("dtype", "shape", "stride", "element_size", "data_ptr")}
        return query_blocks.default_query_block(types.SimpleNamespace(device=device, **kept), precision)

    assert chosen() == (64 if capability == (9, 0) else 128)
    others = {"precision": "16bit"}, {"precision": "fp8"}, {"device": CPU}, {"dtype": torch.float32}, {"head_dim": 64}
    assert all(chosen(**other) == 128 for other in (*others, {"spare": 4})), "spare: strides that TMA does not take"
    assert chosen(spare=8) == chosen()
    views = (torch.empty(300, 132, dtype=torch.bfloat16, device="meta")[:, :d] for d in (128, 64))
    fakes = [FakeTensor(FakeTensorMode(), view, CUDA) for view in views]
    assert [query_blocks.default_query_block(fake, "int8") for fake in fakes] == [chosen(), 128]
    monkeypatch.setattr(hopper, "gluon_is_known", lambda: False)
    assert chosen() == 128


@pytest.mark.parametrize(("told", "capability"), [(None, (8, 9)), ("8.0", (8, 0)), ("12.0", (12, 0))])
def test_the_interpreter_s_card(monkeypatch, told, capability):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if told is None:
        monkeypatch.delenv("SLA2_INTERPRET_CAPABILITY", raising=False)
    else:
        monkeypatch.setenv("SLA2_INTERPRET_CAPABILITY", told)
    assert support.interpreting() and support.capability(CPU) == capability
    assert support.has_fp8(CPU) == (capability >= (8, 9))


@pytest.mark.parametrize(
    ("version", "card", "runs"),
    [
        ((3, 2, 0), (12, 0), False),
        ((3, 3, 0), (10, 0), False),
        ((3, 3, 1), (12, 0), True),
        ((3, 2, 0), (9, 0), True),
    ],
)
def test_blackwell_needs_a_triton_that_compiles_for_it(monkeypatch, version, card, runs):
    monkeypatch.setattr(support, "triton_version", lambda: version)
    monkeypatch.setattr(support, "why_no_triton", lambda: None)
    monkeypatch.setattr(support, "capability", lambda device: card)
    reason = unsupported_reason("cuda", torch.bfloat16, 128, "int8")
    assert reason is None if runs else "needs Triton 3.3.1 or newer" in reason
