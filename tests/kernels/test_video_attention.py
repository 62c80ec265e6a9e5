"""The function for packs with models of their own: what ComfyUI's hook does, without ComfyUI."""

import pytest
import torch

from sla2_kernels import exact_rows, sla2_attention
from sla2_kernels.forced_blocks import select_with_forced_blocks
from sla2_kernels.reference import sla2_reference
from sla2_kernels.sla_v1 import sla_attention
from sla2_kernels.video_attention import video_attention, why_dense


def tensors(tokens=640, dim=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 2, tokens, dim, generator=generator) for _ in range(3)]


def dense(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("layout", ["BHND", "BNHD"])
@pytest.mark.parametrize(("front", "back"), [(0, 0), (70, 0), (0, 33), (70, 33)])
def test_sparsity_0_is_dense_and_exact_rows_always_are(layout, front, back):
    qkv = tensors()
    given = qkv if layout == "BHND" else [t.transpose(1, 2) for t in qkv]
    options = {"front": front, "back": back, "layout": layout, "precision": "16bit"}
    outs = [video_attention(*given, sparsity=sparsity, **options) for sparsity in (0.0, 0.7)]
    exact, sparse = outs if layout == "BHND" else [out.transpose(1, 2) for out in outs]
    torch.testing.assert_close(exact, dense(*qkv), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sparse[:, :, :front], dense(*qkv)[:, :, :front])
    torch.testing.assert_close(sparse[:, :, 640 - back :], dense(*qkv)[:, :, 640 - back :])
    assert (sparse - exact).abs().max() > 1e-2


@pytest.mark.parametrize("query_block", [128, 64])
def test_without_other_tokens_it_is_the_operator(query_block):
    qkv, options = tensors(), {"sparsity": 0.7, "precision": "16bit", "query_block": query_block}
    assert torch.equal(video_attention(*qkv, **options), sla2_attention(*qkv, **options))
    proj_l = torch.eye(32) / 2, torch.zeros(32)
    for method, weights in (("sla", proj_l), ("top-k only", None)):
        out = video_attention(*qkv, method=method, proj_l=weights, **options)
        assert torch.equal(out, sla_attention(*qkv, weights, **options))


def test_64_query_tokens_per_selection_between_other_tokens():
    q, k, v = tensors()
    options = {"sparsity": 0.7, "query_block": 64}
    blocks = select_with_forced_blocks(q[:, :, 70:600], k, front=70, back=40, **options)
    expected, _ = sla2_reference(q[:, :, 70:600], k, v, key_blocks=blocks, query_block=64)
    out = video_attention(q, k, v, front=70, back=40, precision="16bit", **options)
    assert blocks.shape[2] == 9
    torch.testing.assert_close(out[:, :, 70:600].double(), expected, rtol=1e-4, atol=1e-5)


def test_the_callers_dense_attention_runs_the_exact_rows():
    seen = []

    def own(q, k, v):
        seen.append(q.shape[2])
        return dense(q, k, v)

    video_attention(*tensors(), front=70, back=33, precision="16bit", dense=own)
    assert seen == [70, 33]


@pytest.mark.parametrize("layout", ["BHND", "BNHD"])
def test_the_sparse_loop_over_all_key_blocks_is_dense_attention(monkeypatch, layout):
    """As on Hopper, where it runs the exact rows."""
    qkv = tensors()
    given = qkv if layout == "BHND" else [t.transpose(1, 2) for t in qkv]
    options = {"front": 70, "back": 33, "layout": layout, "precision": "16bit", "sparsity": 0.7, "scale": 0.3}
    expected = video_attention(*given, **options)
    monkeypatch.setattr(exact_rows, "takes_exact_rows", lambda *_: True)
    monkeypatch.setattr(exact_rows, "F", None)
    torch.testing.assert_close(video_attention(*given, **options), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["BHND", "BNHD"])
@pytest.mark.parametrize("reference_keys", ["routed", "exact"])
def test_references_run_sparse_between_rows_that_stay_exact(layout, reference_keys):
    """Text, two references, sound, the video, and a reference behind it."""
    qkv, asked = tensors(1100), []
    given = qkv if layout == "BHND" else [t.transpose(1, 2) for t in qkv]

    def own(q, k, v):
        asked.append(q.shape[2 if layout == "BHND" else 1])
        rows = (q, k, v) if layout == "BHND" else (t.transpose(1, 2) for t in (q, k, v))
        out = dense(*rows)
        return out if layout == "BHND" else out.transpose(1, 2)

    options = {"front": 400, "back": 150, "layout": layout, "precision": "16bit", "dense": own}
    options |= {"references": [(30, 190), (190, 370), (950, 1100)], "reference_keys": reference_keys}
    outs = [video_attention(*given, sparsity=sparsity, **options) for sparsity in (0.0, 0.8)]
    exact, sparse = outs if layout == "BHND" else [out.transpose(1, 2) for out in outs]
    assert asked == [60, 60]
    torch.testing.assert_close(exact, dense(*qkv), rtol=1e-4, atol=1e-5)
    for rows in (slice(0, 30), slice(370, 400)):
        torch.testing.assert_close(sparse[:, :, rows], dense(*qkv)[:, :, rows])
    for rows in (slice(30, 190), slice(190, 370), slice(400, 950), slice(950, 1100)):
        assert (sparse - exact)[:, :, rows].abs().max() > 1e-2


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"references": [(30, 700)]}, "references must name tokens of 0 to 640"),
        (
            {"front": 100, "references": [(30, 90)], "reference_keys": "some"},
            'reference_keys must be "routed" or "exact"',
        ),
        ({"front": 100, "references": (0, 90)}, r"references must be pairs \(start, stop\), got \(0, 90\)\."),
        (
            {"front": 100, "references": torch.zeros(1, 3)},
            r"references must be pairs .*, got a tensor of shape \(1, 3\)",
        ),
        ({"front": 100, "references": [(0, 90.0)]}, "references must be an integer, got 90.0"),
        ({"front": 9, "dense": lambda q, k, v: q[:, :, :1]}, r"dense\(\) must return q's shape .* got \(1, 2, 1, 32\)"),
        ({"front": 9, "dense": lambda q, k, v: q.flatten(2)}, r"what dense\(\) returns must have 4 dimensions"),
        ({"front": 9, "back": 9, "keep_diagonal": True, "sparsity": "0.9"}, "sparsity must be"),
        ({"method": "sla"}, 'or "sla" with proj_l'),
        ({"method": "best"}, "got 'best'"),
        ({"front": 600, "back": 40}, "leave video tokens, got 600 and 40 of 640"),
        ({"front": -1}, "at least 0"),
        ({"sparsity": 1.0}, "sparsity must be"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        video_attention(*tensors(), **{"precision": "16bit"} | changes)
    q, k, v = tensors()
    with pytest.raises(ValueError, match="equally many tokens, got 640 and 600"):
        video_attention(q, k[:, :, :600], v[:, :, :600])


def test_shapes_alone_and_compiled():
    """On the meta device, which has no autocast to turn off, and in one graph."""
    proj_l = torch.eye(32) / 2, torch.zeros(32)

    def call(q, k, v):
        return video_attention(q, k, v, front=70, sparsity=0.7, precision="16bit", method="sla", proj_l=proj_l)

    qkv = tensors(tokens=200)
    assert call(*(t.to("meta") for t in qkv)).shape == (1, 2, 200, 32)
    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(*qkv), call(*qkv))


def test_references_compiled_at_several_lengths():
    def call(q, k, v):
        return video_attention(q, k, v, front=300, sparsity=0.7, precision="16bit", references=[(150, 280), (0, 130)])

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for length in (640, 701, 900):
        qkv = tensors(tokens=length)
        assert torch.equal(compiled(*qkv), call(*qkv))


def test_references_in_an_array_are_those_in_a_list():
    found, expected = (
        video_attention(*tensors(), front=300, sparsity=0.7, precision="16bit", references=references)
        for references in (torch.tensor([(150, 280), (0, 130)]), [(150, 280), (0, 130)])
    )
    assert torch.equal(found, expected)


def test_why_dense():
    q, *_ = tensors()
    with pytest.raises(ValueError, match=r"^minimum_tokens must be an integer, got '1'\.$"):
        why_dense(q, minimum_tokens="1")
    assert why_dense(q) == "the sequence has 640 tokens, minimum_tokens is 8192"
    assert why_dense(q, minimum_tokens=0) is None
    assert why_dense(q.to("meta"), minimum_tokens=0, precision="16bit")
