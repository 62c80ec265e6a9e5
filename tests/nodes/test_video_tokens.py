"""Text, reference and pose tokens beside the video's: exact as keys and as queries; where each family has them."""

from types import SimpleNamespace

import pytest
import torch

HEADS, DIM = 2, 64


def call(seed=0, queries=600, keys=600):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, n, HEADS * DIM, generator=generator) for n in (queries, keys, keys)]


def heads_first(tensors):
    return [t.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for t in tensors]


@pytest.mark.parametrize(("front", "expected"), [(70, (70, 90)), (None, (160, 0)), (0, (0, 160))])
def test_rows_of_other_tokens_are_exact_and_those_of_the_video_are_sparse(bench, front, expected):
    qkv, (before, after) = call(), expected
    b = bench(grid=(11, 4, 10), front=front)  # 440 of 600 tokens
    b.model_call()
    out, dense = b.attend(*qkv, heads=HEADS), b.attention(*qkv, heads=HEADS)
    video = slice(before, 600 - after)
    torch.testing.assert_close(out[:, :before], dense[:, :before])
    torch.testing.assert_close(out[:, 600 - after :], dense[:, 600 - after :])
    assert not torch.allclose(out[:, video], dense[:, video], atol=1e-3)
    assert b.run.layers[0].sparse == 1 and not b.run.layers[0].dense


@pytest.mark.parametrize("layout", ["flat", "heads first"])
@pytest.mark.parametrize("masked", [0, 30], ids=["all text", "text masked"])
@pytest.mark.parametrize("chosen", ["nobody", "a node", "the user", "training"])
def test_the_sparse_loop_computes_exact_rows_where_nobody_chose_their_attention(
    bench, pack_module, monkeypatch, chosen, masked, layout
):
    """On the card where it is faster; what a user or a node chose computes them as before, and so does training's."""
    monkeypatch.setattr(pack_module("nodes.attention.self_attention"), "takes_rows", lambda request: True)
    monkeypatch.setattr(pack_module("sla2_kernels.exact_rows"), "takes_exact_rows", lambda *_: True)
    if chosen != "the user":
        monkeypatch.setattr(pack_module("nodes.attention.override"), "DEFAULT", "conftest.dense_attention")
    b, asked = bench(grid=(11, 4, 10), front=70), []

    def watched(func, *args, **kwargs):
        asked.append(func)
        return func(*args, **kwargs)

    if chosen == "a node":
        b.override = b.override_over(watched)
    see = b.run.see_handed_on
    monkeypatch.setattr(b.run, "see_handed_on", lambda *args: asked.append(args) or see(*args))
    qkv = call() if layout == "flat" else heads_first(call())
    given = {
        "mask": (torch.arange(600) >= masked)[None, None, None] if masked else None,
        "skip_reshape": layout != "flat",
    }
    with torch.set_grad_enabled(chosen == "training"):
        b.model_call()
        out, dense = b.attend(*qkv, HEADS, **given), b.attention(*qkv, HEADS, **given)
    assert bool(asked) == (chosen != "nobody")
    for rows in (slice(0, 70), slice(510, 600)):
        torch.testing.assert_close(out[:, rows], dense[:, rows], rtol=1e-4, atol=1e-5)
    assert b.run.layers[0].sparse == 1 and not b.run.layers[0].dense


@pytest.mark.parametrize("masked", [0, 30], ids=["all text", "text masked"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_exact_rows_that_autocast_gave_another_dtype_join_the_others(bench, dtype, masked):
    b = bench(grid=(11, 4, 10), front=70)
    mask = (torch.arange(600) >= masked)[None, None, None]
    b.model_call()
    with torch.autocast("cpu", dtype=torch.bfloat16 if dtype == torch.float16 else torch.float16):
        out = b.attend(*(t.to(dtype) for t in call()), heads=HEADS, mask=mask if masked else None)
    assert b.run.layers[0].sparse == 1 and out.dtype == dtype and torch.isfinite(out).all()


def test_every_video_query_attends_the_other_tokens_exactly(bench):
    """Values of text tokens alone: with softmax over all keys, a query's output is the text's share of its attention."""
    q, k, v = call()
    k[:, :100] *= 3  # most of the mass lies on the text
    v[:, 100:] = 0
    b = bench(grid=(5, 10, 10), front=100, sparsity=0.7)
    b.model_call()
    out, dense = b.attend(q, k, v, heads=HEADS), b.attention(q, k, v, heads=HEADS)
    assert (out - dense).norm() / dense.norm() < 0.1
    b = bench(grid=(6, 10, 10), front=0, sparsity=0.7)
    b.model_call()
    assert (b.attend(q, k, v, heads=HEADS) - dense).norm() / dense.norm() > 0.3


@pytest.mark.parametrize("method", ["sla2", "top-k only"])
def test_the_operator_selects_around_other_tokens_itself(bench, pack_module, monkeypatch, method):
    module, given = pack_module("nodes.attention.sparse_call"), []
    for name in ("sla2_attention", "fitted_attention", "sla_attention"):
        original = getattr(module, name)

        def watched(*args, original=original, **options):
            given.append((options.get("key_blocks"), options["exact_keys"], options["room"]))
            return original(*args, **options)

        monkeypatch.setattr(module, name, watched)
    b = bench(grid=(5, 10, 10), front=100, method=method)
    b.model_call()
    b.attend(*call(), heads=HEADS)
    assert given == [(None, (100, 0), (100, 0))]


@pytest.mark.parametrize("layout", ["flat", "heads first", "heads first in and out"])
def test_sparsity_0_equals_dense_in_every_layout(bench, layout):
    qkv, b = call(), bench(grid=(11, 4, 10), front=70, sparsity=0.0)
    keywords = {"skip_reshape": layout != "flat", "skip_output_reshape": layout.endswith("out")}
    tensors = qkv if layout == "flat" else heads_first(qkv)
    b.model_call()
    out = b.attend(*tensors, HEADS, **keywords)
    torch.testing.assert_close(out, b.attention(*tensors, HEADS, **keywords), rtol=1e-4, atol=1e-5)
    out = b.attend(*tensors, HEADS, None, None, *keywords.values())
    torch.testing.assert_close(out, b.attention(*tensors, HEADS, **keywords), rtol=1e-4, atol=1e-5)


def test_queries_of_one_frame_see_the_video_and_the_pose_frame_behind_it(bench):
    q, k, v = call(queries=100, keys=700)
    b = bench(grid=(5, 10, 10), front=100, by_frame=True, sparsity=0.0)
    b.model_call()
    torch.testing.assert_close(b.attend(q, k, v, heads=HEADS), b.attention(q, k, v, heads=HEADS), rtol=1e-4, atol=1e-5)
    assert b.run.layers[0].sparse == 1
    b.attend(q, k[:, :600], v[:, :600], heads=HEADS, layer=1)
    assert b.run.layers[1].dense == {"the queries are those of the reference image": 1}


def test_the_reference_images_queries_are_no_reason_to_stop(bench):
    b = bench(grid=(5, 10, 10), front=100, by_frame=True, stop_on_unsupported=True)
    b.model_call()
    q, k, v = call(queries=100, keys=600)
    assert torch.equal(b.attend(q, k, v, heads=HEADS), b.attention(q, k, v, heads=HEADS))


@pytest.mark.parametrize("grid", [(7, 10, 10), (0, 10, 10)])
def test_a_call_without_the_whole_video_stays_dense(bench, grid):
    b = bench(grid=grid)
    b.model_call()
    b.attend(*call(), heads=HEADS)
    (reason,) = b.run.layers[0].dense
    assert "the call has 600 key tokens, fewer than" in reason


def test_the_report_counts_forced_keys_and_dense_rows_as_kept(bench):
    b = bench(grid=(5, 10, 10), front=100, sparsity=0.5)
    b.model_call()
    b.attend(*call(), heads=HEADS)
    # the 500 queries of the video keep 2 forced key blocks and 4 of 8 free ones; the 100 in front keep all 600 keys
    assert b.run.layers[0].sparsity == pytest.approx(500 / 600 * (1 - 6 * 64 / 600))


LATENT = torch.zeros(1, 16, 5, 16, 20)
GRIDS = {
    "padded": ("latent_grid", {"x": torch.zeros(1, 16, 3, 15, 17)}, (3, 8, 9)),
    "image": ("latent_grid", {"x": LATENT[:, :, 0]}, (1, 8, 10)),
    "with sound": ("latent_grid", {"x": [LATENT, torch.zeros(1, 8, 2, 9)]}, (5, 8, 10)),
    "after the reference frame": ("grid_after_first_frame", {"x": LATENT}, (4, 8, 10)),
    "without guides": ("ltx_grid", {"x": LATENT, "keyframe_idxs": torch.zeros(1, 3, 160)}, (3, 8, 10)),
}


@pytest.mark.parametrize(("name", "inputs", "grid"), GRIDS.values(), ids=GRIDS)
def test_grids(pack_module, name, inputs, grid):
    assert getattr(pack_module("nodes.attention.video_tokens"), name)(inputs, (1, 2, 2)) == grid


PLAIN, WITH_REFERENCE = SimpleNamespace(ref_conv=None), SimpleNamespace(ref_conv=object())
OLD, NEW = (SimpleNamespace(double_blocks=[SimpleNamespace(flipped_img_txt=flipped)]) for flipped in (True, False))
FRONTS = {
    "Wan without the weights": ("wan_reference", PLAIN, {"reference_latent": LATENT[:, :, 0]}, 0),
    "Wan with them": ("wan_reference", WITH_REFERENCE, {"reference_latent": LATENT[:, :, 0]}, 80),
    "Wan without a reference": ("wan_reference", WITH_REFERENCE, {}, 0),
    "SCAIL": ("scail_reference", PLAIN, {"reference_latent": LATENT[:, :, :2]}, 160),
    "Hunyuan": ("hunyuan_prefix", NEW, {}, None),
    "Hunyuan before 0.4": ("hunyuan_prefix", OLD, {}, 0),
    "Hunyuan before 0.4 with a reference": ("hunyuan_prefix", OLD, {"ref_latent": LATENT[:, :, :1]}, 80),
    "Animate-2": ("first_frame", PLAIN, {"x": LATENT}, 80),
    "Flux": ("text_prefix", PLAIN, {"context": torch.zeros(1, 77, 8)}, 77),
}


@pytest.mark.parametrize(("name", "model", "inputs", "front"), FRONTS.values(), ids=FRONTS)
def test_fronts(pack_module, name, model, inputs, front):
    assert getattr(pack_module("nodes.attention.video_tokens"), name)(model, inputs, (1, 2, 2)) == front


def test_inputs_are_known_by_name_however_they_are_passed(pack_module):
    def forward(x, timestep, context, options=None, **kwargs):
        return None

    found = pack_module("nodes.attention.video_tokens").call_inputs(
        forward, (1, 2), {"context": 3, "reference_latent": 4}
    )
    assert found == {"x": 1, "timestep": 2, "context": 3, "reference_latent": 4}


PICTURES = ((90, 230), (230, 400))


@pytest.mark.parametrize("heads_are_first", [False, True])
@pytest.mark.parametrize("reference_keys", ["routed", "exact"])
def test_queries_of_references_run_sparse_and_those_between_them_exactly(bench, heads_are_first, reference_keys):
    """Text, two pictures and sound before 500 video tokens, which end behind them; one dense call for all that is exact."""
    qkv, asked = call(queries=940, keys=940), []
    qkv = heads_first(qkv) if heads_are_first else qkv
    kwargs = {"skip_reshape": True, "skip_output_reshape": True} if heads_are_first else {}
    b = bench(grid=(5, 10, 10), front=440, references=PICTURES, sparsity=0.7, reference_keys=reference_keys)

    def counted(func, *args, **kwargs):
        asked.append(args[0].shape[2 if heads_are_first else 1])
        return func(*args, **kwargs)

    b.model_call(override=b.override_over(counted))
    out, dense = b.attend(*qkv, heads=HEADS, **kwargs), b.attention(*qkv, heads=HEADS, **kwargs)
    assert asked == [90 + 40]
    axis = 2 if heads_are_first else 1
    for start, stop in ((0, 90), (400, 440)):
        torch.testing.assert_close(out.narrow(axis, start, stop - start), dense.narrow(axis, start, stop - start))
    for start, stop in (*PICTURES, (440, 940)):
        rows = [t.narrow(axis, start, stop - start) for t in (out, dense)]
        assert 1e-2 < ((rows[0] - rows[1]).norm() / rows[1].norm()).item() < 1
    exactly = bench(grid=(5, 10, 10), front=440, references=PICTURES, sparsity=0.0)
    exactly.model_call()
    torch.testing.assert_close(exactly.attend(*qkv, heads=HEADS, **kwargs), dense, rtol=1e-4, atol=1e-5)


def test_rows_that_a_reference_computes_twice_count_once(bench, pack_module):
    """940 tokens are 15 key blocks, of which 5 hold tokens of two kinds; routed are 1 of each picture and 8 of the video."""
    references = pack_module("sla2_kernels.references")
    stretches = pack_module("sla2_kernels.stretches").Stretches(940, (440, 940), PICTURES)
    selected = references.selected_with_references(stretches, 0.7, keep_diagonal=True)
    b = bench(grid=(5, 10, 10), front=440, references=PICTURES, sparsity=0.7)
    b.hook.begin_run()
    b.model_call()
    b.attend(*call(queries=940, keys=940), heads=HEADS)
    b.hook.end_run()
    run = b.hook.runs.finished()[-1]
    kept = (810 * 64 * selected + 130 * 940) / 940**2
    assert selected < 15 and run.sparsity == pytest.approx(1 - kept)
    assert run.attention_error > 0


def test_references_of_h3_are_read_from_its_own_table(pack_module):
    tokens = pack_module("nodes.attention.video_tokens")
    segments = [
        (0, 24, "text"),
        (24, 104, "cond"),
        (104, 110, "cond_audio"),
        (110, 190, "ref_img"),
        (190, 190, "ref_img"),
    ]
    segments += [(190, 208, "audio"), (208, 528, "video")]
    ranges = tokens.h3_references({"minimax_payload": {"layout": SimpleNamespace(segments=segments)}})
    assert ranges(208, 320, 528) == ((24, 104), (110, 190))
    assert ranges(209, 320, 529) == (), "a table of another call"
    tags = torch.tensor([1] * 10 + [0] * 130 + [1] * 4 + [0] * 200 + [0] * 0 + [1] * 6 + [0] * 100)
    shown = [(0, 450, "text"), (450, 600, "ref_img"), (600, 920, "video")]
    payload = {"layout": SimpleNamespace(segments=shown), "text_token_tags": tags[None]}
    found = tokens.h3_references({"minimax_payload": payload})(600, 320, 920)
    assert found == ((10, 140), (144, 344), (450, 600)), "100 tokens fill no block of queries"
    payload["text_token_tags"] = tags[:-1]
    assert tokens.h3_references({"minimax_payload": payload})(600, 320, 920) == ((450, 600),)
    assert tokens.h3_references({})(208, 320, 528) == ()
    assert tokens.h3_references({"minimax_payload": None})(208, 320, 528) == ()


def test_what_stands_around_wans_video_is_pictures(pack_module):
    ranges = pack_module("nodes.attention.video_tokens").all_beside({})
    assert ranges(80, 320, 480) == ((0, 80), (400, 480))
    assert ranges(0, 320, 400) == ((320, 400),) and ranges(0, 320, 320) == ()
