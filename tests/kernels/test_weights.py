"""The router file: what is written comes back, and whatever is wrong with a file is one sentence."""

import json
import os
import pickle
import threading

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sla2_kernels import sla2_attention, weights
from sla2_kernels.router_format import RouterFileError
from sla2_kernels.weights import RouterLayer, RouterWeights, identity_router, load_router

HEADS, DIM, LAYERS = 3, 8, 2
SPARSITIES = (0.97, 0.9)


def make_router(**changes):
    generator = torch.Generator().manual_seed(0)
    layers = (
        RouterLayer(
            proj_q=torch.randn(DIM, DIM, generator=generator),
            proj_k=torch.randn(HEADS, DIM, DIM, generator=generator),
            alpha_logits=torch.randn(len(SPARSITIES), HEADS, 4, generator=generator),
        ),
        RouterLayer(),
    )
    facts = {
        "model_family": "wan2.1",
        "num_heads": HEADS,
        "head_dim": DIM,
        "sparsities": SPARSITIES,
        "precision": "int8",
    }
    return RouterWeights(**{"layers": layers, **facts, **changes})


def file_parts(path):
    router = make_router()
    router.save(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    return safetensors.torch.load_file(path), metadata


def loading_error(path):
    """The loader's message: one line, one sentence, naming the file."""
    with pytest.raises(RouterFileError) as caught:
        load_router(path)
    message = str(caught.value)
    assert os.fspath(path) in message
    assert "\n" not in message and message.endswith(".") and len(message) < 700
    return message


def assert_same(a, b):
    assert (a.model_family, a.num_heads, a.head_dim, a.q_block, a.k_block) == (
        b.model_family,
        b.num_heads,
        b.head_dim,
        b.q_block,
        b.k_block,
    )
    assert (a.keep_diagonal, a.token_order, a.sparsities, a.precision, a.num_layers) == (
        b.keep_diagonal,
        b.token_order,
        b.sparsities,
        b.precision,
        b.num_layers,
    )
    for layer, other in zip(a.layers, b.layers, strict=True):
        for kind in ("proj_q", "proj_k", "alpha_logits"):
            x, y = getattr(layer, kind), getattr(other, kind)
            assert (x is None) == (y is None)
            assert x is None or torch.equal(x, y)


@pytest.mark.parametrize("changes", [{}, {"q_block": 64}])
def test_what_is_saved_comes_back(tmp_path, changes):
    router = make_router(**changes)
    router.save(tmp_path / "r.safetensors")
    loaded = load_router(tmp_path / "r.safetensors")
    assert_same(router, loaded)
    assert os.listdir(tmp_path) == ["r.safetensors"]


def test_no_header_length_is_mistaken_for_another_format(tmp_path):
    lengths = set()
    for size in range(1, 101, 4):
        make_router(model_family="m" * size).save(tmp_path / "r.safetensors")
        lengths.add((tmp_path / "r.safetensors").read_bytes()[:2])
        assert load_router(tmp_path / "r.safetensors").model_family == "m" * size
    assert b"\x80\x02" in lengths  # the first bytes of a pickle


def test_identity_router_has_nothing_trained_and_survives_a_file(tmp_path):
    router = identity_router("wan2.1", 30, 12, 128)
    router.save(tmp_path / "r.safetensors")
    loaded = load_router(tmp_path / "r.safetensors")
    assert loaded.num_layers == 30 and loaded.ratio(29, 0.97) is None
    assert loaded.layers[7].proj_q is None and loaded.precision is None
    assert loaded.keep_diagonal


def test_a_router_says_whether_it_keeps_the_diagonal(tmp_path):
    path = tmp_path / "r.safetensors"
    for kept in (True, False):
        make_router(keep_diagonal=kept).save(path)
        assert load_router(path).keep_diagonal is kept
    # a file of the first versions has no such entry, and its router was trained without
    make_router(keep_diagonal=True).save(path)
    tensors, metadata = safetensors.torch.load_file(path), {**file_parts(path)[1]}
    del metadata["keep_diagonal"]
    safetensors.torch.save_file(tensors, path, metadata=metadata)
    assert load_router(path).keep_diagonal is False
    with pytest.raises(RouterFileError, match="keep_diagonal must be true or false"):
        make_router(keep_diagonal="yes")


def test_saving_over_the_file_it_came_from(tmp_path):
    path = tmp_path / "r.safetensors"
    make_router().save(path)
    loaded = load_router(path)
    loaded.save(path)
    assert_same(loaded, load_router(path))


def test_shared_and_strided_tensors_are_saved(tmp_path):
    proj = torch.randn(DIM, DIM).T
    make_router(layers=(RouterLayer(proj, proj),)).save(tmp_path / "r.safetensors")
    assert torch.equal(load_router(tmp_path / "r.safetensors").layers[0].proj_k, proj)


def test_saving_through_a_link_keeps_the_link(tmp_path):
    real, link = tmp_path / "real.safetensors", tmp_path / "link.safetensors"
    make_router().save(real)
    link.symlink_to(real)
    make_router(precision="fp8").save(link)
    assert link.is_symlink() and load_router(real).precision == "fp8"


def test_a_failed_save_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "r.safetensors"
    make_router().save(path)
    before = path.read_bytes()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights.os, "fsync", full_disk)
    with pytest.raises(RouterFileError, match="r.safetensors cannot be written: No space left"):
        make_router(precision="fp8").save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["r.safetensors"]


def test_readers_never_see_half_a_file(tmp_path):
    path = tmp_path / "r.safetensors"
    make_router().save(path)
    stop = threading.Event()

    def write():
        while not stop.is_set():
            make_router().save(path)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(30):
            assert load_router(path).num_layers == LAYERS
    finally:
        stop.set()
        writer.join()


def test_ratio_interpolates_logits_between_trained_sparsities_and_clamps_outside():
    router = make_router()
    logits = router.layers[0].alpha_logits
    at_90, at_97 = torch.sigmoid(logits[1]), torch.sigmoid(logits[0])
    torch.testing.assert_close(router.ratio(0, 0.9), at_90)
    torch.testing.assert_close(router.ratio(0, 0.97), at_97)
    torch.testing.assert_close(router.ratio(0, 0.5), at_90)
    torch.testing.assert_close(router.ratio(0, 0.99), at_97)
    torch.testing.assert_close(router.ratio(0, 0.935), torch.sigmoid((logits[0] + logits[1]) / 2))
    assert router.ratio(1, 0.9) is None


def test_ratio_stays_inside_0_and_1_for_huge_logits():
    layer = RouterLayer(alpha_logits=torch.tensor([[[-1e30, 1e30]]]))
    ratio = RouterWeights((layer,), "m", 1, DIM, sparsities=(0.9,)).ratio(0, 0.9)
    assert 0 < ratio[0, 0] < 1e-6 and 1 - 1e-6 < ratio[0, 1] < 1


@pytest.mark.parametrize(
    ("layer", "sparsity", "words"),
    [
        (0, None, "sparsity must be at least 0 and below 1, got None"),
        (0, "0.9", "sparsity must be at least 0 and below 1, got '0.9'"),
        (2, 0.9, "This router has layers 0 to 1, not 2"),
        (0.5, 0.9, "layer must be an integer, got 0.5"),
    ],
)
def test_a_ratio_that_is_asked_for_in_a_wrong_way(layer, sparsity, words):
    with pytest.raises(ValueError, match=words):
        make_router().ratio(layer, sparsity)


@pytest.mark.parametrize("path", [None, 3, b"router", "a\0b", "a\ud800b"])
def test_a_file_without_a_path(path):
    for use in (load_router, make_router().save):
        with pytest.raises(RouterFileError, match="named by its path, got ") as caught:
            use(path)
        assert str(caught.value).isprintable()


def test_an_identity_router_of_no_number_of_layers():
    for layers in ("3", 3.0, True):
        with pytest.raises(ValueError, match=f"^num_layers must be an integer, got {layers!r}"):
            identity_router("wan", layers, 2, 16)


def test_require_model_names_the_first_mismatch():
    router = make_router()
    model = {"model_family": "wan2.1", "num_layers": LAYERS, "num_heads": HEADS, "head_dim": DIM}
    router.require_model(**model)
    for change, words in (
        ({"model_family": "ltx"}, "model family is wan2.1, this model's is ltx"),
        ({"num_layers": 40}, "number of layers is 2, this model's is 40"),
        ({"num_heads": 40}, "number of heads is 3, this model's is 40"),
        ({"head_dim": 128}, "head_dim is 8, this model's is 128"),
    ):
        with pytest.raises(RouterFileError, match=words):
            router.require_model(**{**model, **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": ()}, "num_layers must be a whole number from 1"),
        ({"num_heads": 0}, "num_heads must be"),
        ({"head_dim": 8.0}, "head_dim must be"),
        ({"head_dim": 16}, "tensor layers.0.proj_q must have shape"),
        ({"num_heads": 4}, "tensor layers.0.proj_k must have shape"),
        ({"q_block": 32}, "q_block must be 128 or 64"),
        ({"q_block": 64.0}, "q_block must be 128 or 64"),
        ({"k_block": 128}, "k_block must be 64"),
        ({"token_order": "hilbert"}, "token_order must be"),
        ({"sparsities": (0.9,)}, "tensor layers.0.alpha_logits must have shape"),
        ({"sparsities": (0.9, 0.9)}, "sparsities must be different"),
        ({"sparsities": (0.9, 1.0)}, "sparsities must be different numbers from 0"),
        ({"precision": "int4"}, "precision must be"),
        ({"model_family": ""}, "model_family must be"),
        (
            {"layers": (RouterLayer(proj_q=torch.eye(DIM).bfloat16()),)},
            "tensor layers.0.proj_q must be float32 or float16, got bfloat16",
        ),
        ({"layers": None}, "layers must be a sequence of RouterLayers, got None"),
        ({"layers": [None]}, r"layers must be a sequence of RouterLayers, got \[None\]"),
        ({"sparsities": None}, "sparsities must be a sequence of numbers, got None"),
        ({"sparsities": 0.9}, "sparsities must be a sequence of numbers, got 0.9"),
        ({"sparsities": ("high", 0.9)}, "sparsities must be a sequence of numbers, got .'high', 0.9"),
        ({"layers": (RouterLayer([1.0]),)}, "layers.0.proj_q must be a dense tensor that holds values, got a list"),
        ({"layers": (RouterLayer(torch.eye(DIM, device="meta")),)}, "layers.0.proj_q .* got one on the meta device"),
        ({"layers": (RouterLayer(torch.eye(DIM).to_sparse()),)}, "layers.0.proj_q .* got layout torch.sparse_coo"),
        ({"layers": (RouterLayer(proj_k=torch.full((DIM, DIM), torch.nan)),)}, "layers.0.proj_k must hold finite"),
    ],
)
def test_a_router_checks_itself(change, words):
    with pytest.raises(RouterFileError, match=words):
        make_router(**change)


def written(path, router, **options):
    """(dtype of each stored tensor, format version) of a router saved to ``path``."""
    router.save(path, **options)
    with safetensors.safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).dtype for name in file.keys()}, file.metadata()["format_version"]


def test_a_large_router_is_stored_in_16_bit(tmp_path, monkeypatch):
    """The projections of MiniMax H3 (50 layers, 56 heads of 128) take 350 MiB in float32. Earlier releases read the small ones."""
    path, router = tmp_path / "r.safetensors", make_router()
    whole, version = written(path, router)
    assert set(whole.values()) == {torch.float32} and version == "1"
    monkeypatch.setattr(weights, "MAX_FLOAT32_BYTES", 4 * (DIM * DIM + HEADS * DIM * DIM) - 1)
    stored, version = written(path, router)
    assert {name.split(".")[2]: str(dtype) for name, dtype in stored.items()} == {
        "proj_q": "torch.float16",
        "proj_k": "torch.float16",
        "alpha_logits": "torch.float32",
    }
    assert version == "2"
    loaded = load_router(path)
    assert torch.equal(loaded.layers[0].proj_k, router.layers[0].proj_k.half())
    assert torch.equal(loaded.layers[0].alpha_logits, router.layers[0].alpha_logits)
    assert written(path, loaded) == (stored, "2")
    assert_same(load_router(path), loaded)
    assert set(written(path, loaded, storage="float32")[0].values()) == {torch.float32}
    with pytest.raises(ValueError, match='storage must be "auto", "float32" or "float16", got \'int8\''):
        router.save(path, storage="int8")


def test_a_projection_outside_float16_keeps_its_precision(tmp_path):
    layer = RouterLayer(proj_q=torch.eye(DIM) * 1e5, proj_k=torch.eye(DIM))
    stored, _ = written(tmp_path / "r.safetensors", make_router(layers=(layer,)), storage="float16")
    assert stored == {"layers.0.proj_q": torch.float32, "layers.0.proj_k": torch.float16}


@pytest.mark.parametrize("shape", [(DIM, DIM), (HEADS, DIM, DIM)])
def test_stored_projections_give_the_output_of_their_float32_values(shape):
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, HEADS, 300, DIM, generator=generator) for _ in range(3))
    proj = (torch.eye(DIM) + 0.3 * torch.randn(shape, generator=generator)).half()
    outs = [sla2_attention(q, k, v, p, p, sparsity=0.5, precision="16bit") for p in (proj, proj.float())]
    assert torch.equal(*outs)


def test_files_that_are_something_else(tmp_path):
    path = tmp_path / "other.safetensors"
    assert "cannot be read: No such file" in loading_error(path)
    torch.save({"w": torch.ones(2)}, path)
    assert "pickle" in loading_error(path)
    path.write_bytes(pickle.dumps({"w": 1}))
    assert "pickle" in loading_error(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    assert "Git LFS" in loading_error(path)
    for content in (b"", b"abc", b"<html>404 not found, sorry</html>", b"\0" * 4096, b"\0" * 8 + b"{}"):
        path.write_bytes(content)
        assert "safetensors" in loading_error(path)
    assert "cannot be read" in loading_error(tmp_path)


def test_a_huge_header_is_not_read(tmp_path):
    path = tmp_path / "huge.safetensors"
    with open(path, "wb") as file:
        file.write((2**33).to_bytes(8, "little"))
        file.truncate(2**33 + 8)  # a sparse file: it takes no room
    assert "header must be at most" in loading_error(path)


def test_a_deep_header_is_refused(tmp_path):
    path = tmp_path / "deep.safetensors"
    header = b"[" * 200_000
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert "not JSON" in loading_error(path)


def test_every_cut_is_noticed(tmp_path):
    path = tmp_path / "cut.safetensors"
    make_router().save(path)
    whole = path.read_bytes()
    for length in [*range(64), *range(64, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert "cut" in loading_error(path) or "safetensors" in loading_error(path)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("format", "lora", "not a router made by"),
        ("format_version", "3", "update the pack"),
        ("format_version", "one", "format_version must be a whole number"),
        ("num_layers", "1", "tensor layers.1.proj_q does not belong"),
        ("num_layers", "9" * 5000, "num_layers must be a whole number"),
        ("num_layers", "999999", "num_layers must be a whole number from 1 to"),
        ("num_heads", "4", "tensor layers.0.alpha_logits must have shape"),
        ("head_dim", "128", "must have shape (128, 128) or (3, 128, 128)"),
        ("head_dim", None, "head_dim must be a whole number"),
        ("q_block", "96", "q_block must be 128 or 64"),
        ("token_order", "spiral", 'token_order must be "raster"'),
        ("sparsities", "[0.97]", "alpha_logits must have shape"),
        ("sparsities", "[NaN, 0.9]", "sparsities must be a list of numbers"),
        ("sparsities", "[1e400, 0.9]", "sparsities must be a list of numbers"),
        ("sparsities", "{}", "sparsities must be a JSON list"),
        ("sparsities", "[0.9, 0.9]", "sparsities must be different"),
        ("precision", "int4", "precision must be"),
        ("keep_diagonal", "yes", "keep_diagonal must be true or false"),
        ("keep_diagonal", "True", "keep_diagonal must be true or false"),
        ("model_family", "a\nb", "model_family must be"),
        ("tensors", "[]", "is not listed in its metadata"),
        ("tensors", "[[]]", "list of tensor names"),
    ],
)
def test_metadata_that_does_not_fit(tmp_path, name, value, words):
    path = tmp_path / "r.safetensors"
    tensors, metadata = file_parts(path)
    tensors["layers.1.proj_q"] = torch.eye(DIM)
    metadata["tensors"] = json.dumps(sorted(tensors))
    if value is None:
        del metadata[name]
    else:
        metadata[name] = value
    safetensors.torch.save_file(tensors, path, metadata=metadata)
    assert words in loading_error(path)


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("layers.0.proj_q", torch.eye(DIM).bfloat16(), "layers.0.proj_q must be float32 or float16, got BF16"),
        ("layers.0.proj_q", torch.eye(DIM, dtype=torch.int64), "layers.0.proj_q must be float32 or float16, got I64"),
        ("layers.0.proj_k", torch.eye(DIM + 1), "layers.0.proj_k must have shape (8, 8) or (3, 8, 8), got (9, 9)"),
        ("layers.0.proj_k", torch.full((DIM, DIM), torch.inf), "layers.0.proj_k must hold finite numbers"),
        (
            "layers.0.alpha_logits",
            torch.zeros(2, HEADS, 1).half(),
            "layers.0.alpha_logits must be float32, got float16",
        ),
        ("layers.0.alpha_logits", torch.zeros(2, HEADS, 0), "1 or more knots"),
        ("layers.0.alpha_logits", torch.full((2, HEADS, 1), torch.nan), "layers.0.alpha_logits must hold finite"),
        ("layers.0.alpha_logits", None, "layers.0.alpha_logits is missing"),
        ("layers.2.proj_q", torch.eye(DIM), "layers.2.proj_q does not belong in it: 2 layers"),
        ("blocks.0.to_q.lora_A", torch.eye(DIM), "blocks.0.to_q.lora_A does not belong"),
        ("evil\nname", torch.eye(DIM), "'evil\\nname' does not belong"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, name, tensor, words):
    path = tmp_path / "r.safetensors"
    tensors, metadata = file_parts(path)
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    safetensors.torch.save_file(tensors, path, metadata=metadata)
    assert words in loading_error(path)


def test_a_diffusion_model_is_refused_without_reading_it(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"w": torch.ones(4)}, path, metadata={"modelspec.architecture": "wan"})
    assert "not a router made by SLA2TrainRouter" in loading_error(path)
    safetensors.torch.save_file({"w": torch.ones(4)}, path)
    assert "not a router made by SLA2TrainRouter" in loading_error(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from(["layers.0.proj_q", "layers.0.proj_k", "layers.0.alpha_logits", "__metadata__"])
fields = st.sampled_from(
    ["dtype", "shape", "data_offsets", "sparsities", "num_layers", "head_dim", "tensors", "format"]
)


def load_or_refuse(path):
    """Any file either loads as a router that is sound, or is refused with a RouterFileError: nothing else may come out."""
    try:
        router = load_router(path)
    except RouterFileError as error:
        assert "\n" not in str(error)
    else:
        assert all(t is None or torch.isfinite(t).all() for x in router.layers for t in (x.proj_q, x.proj_k))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_fuzzed_bytes(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzzed_bytes.safetensors"
    make_router().save(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1) | st.integers(0, 800))
        content[position : position + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    path.write_bytes(content)
    load_or_refuse(path)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(name=names, field=fields, value=json_values, remove=st.booleans())
def test_fuzzed_header(tmp_path_factory, name, field, value, remove):
    path = tmp_path_factory.getbasetemp() / "fuzzed_header.safetensors"
    make_router().save(path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    if remove:
        header[name].pop(field, None)
    else:
        header[name][field] = value
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + length :])
    load_or_refuse(path)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(content=st.binary(max_size=200), claim=st.integers(0, 2**64 - 1) | st.none())
def test_fuzzed_from_nothing(tmp_path_factory, content, claim):
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes((len(content) if claim is None else claim).to_bytes(8, "little") + content)
    load_or_refuse(path)
