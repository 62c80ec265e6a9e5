"""The quality table at tiny size: it runs whole, its formulas are right, its bars are judged from its rows."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import quality, quality_report, video_metrics
from benchmarks import quality_variants as names
from benchmarks.rivals import fitted_sla, pooled_tail, sol_attn
from benchmarks.synthetic import synthetic_captures
from miniature.captures import Capture, save_captures


@pytest.mark.slow
def test_tiny_mode_writes_every_variant_with_every_metric(tmp_path, monkeypatch):
    tiny = quality.Miniature.tiny("cpu")
    # 180 tokens instead of 320: every variant decodes its video
    monkeypatch.setattr(tiny, "size", (17, 96, 96))
    monkeypatch.setattr(quality.Miniature, "tiny", lambda device: tiny)
    quality.main(
        ["--tiny", "--device", "cpu", "--out", str(tmp_path / "quality"), "--save-router", str(tmp_path / "r.st"),
         "--sheet", str(tmp_path / "frames.jpg")]
    )  # fmt: skip
    content = json.loads((tmp_path / "quality.json").read_text())
    found = {(row["variant"], row["precision"]) for row in content["rows"]}
    assert {(names.STAGE_1, "16bit"), (names.STAGE_1, "int8"), (names.UNTRAINED, "16bit"), (names.DENSE, None)} <= found
    assert {names.HEURISTIC, names.ESTIMATED, names.ROUTER_ONLY, names.BLOCK_SPARSE, names.V1_FITTED} <= {
        v for v, _ in found
    }
    for row in content["rows"]:
        assert row["validation_loss"] > 0
        if row["variant"] == names.DENSE:
            assert row["error"] == 0 and row["psnr"] is None
        else:
            assert row["error"] > 0 and row["psnr"] > 0 and 0 < row["ssim"] <= 1
            assert set(row["error_by_layer"]) == {"0", "1"}
    text = (tmp_path / "quality.md").read_text()
    assert "a test of the script, not a measurement" in text and "layer 1" in text
    assert (tmp_path / "r.st").exists()
    assert (tmp_path / "frames.jpg").read_bytes()[:2] == b"\xff\xd8"


@pytest.fixture
def capture_files(tmp_path):
    paths = []
    for name, seed in (("train", 0), ("held_out", 100)):
        path = tmp_path / f"{name}.safetensors"
        save_captures(path, synthetic_captures(2, layers=1, first_seed=seed, grid=(4, 8, 16)))
        paths.append(str(path))
    return paths


def test_captures_of_any_model_give_output_errors_alone(capture_files, tmp_path):
    train, held_out = capture_files
    out = tmp_path / "model"
    quality.main(
        ["--captures", held_out, "--train-captures", train, "--sparsities", "0.75", "--precisions", "16bit",
         "--observations", "5", "--device", "cpu", "--out", str(out)]
    )  # fmt: skip
    content = json.loads(out.with_suffix(".json").read_text())
    assert all("psnr" not in row and "validation_loss" not in row for row in content["rows"])
    by_name = {row["variant"]: row for row in content["rows"]}
    assert by_name[names.STAGE_1]["error"] < by_name[names.BLOCK_SPARSE]["error"]
    assert by_name[names.STAGE_1]["kept"] == 0.25
    assert "PSNR" not in out.with_suffix(".md").read_text()


def test_the_heuristic_routers_ratio_is_the_best_constant():
    captures = [
        Capture(0, *(x.transpose(1, 2) for x in _qkv(tokens=1024, seed=seed)), (4, 16, 16)) for seed in range(2)
    ]
    router = quality.fit_heuristic(captures, [0.5], False)
    expected = quality.dense_outputs(captures)

    def error(shift):
        layer = router.layers[0]
        moved = replace(router, layers=(replace(layer, alpha_logits=layer.alpha_logits + shift),))
        return quality.output_errors(names.sla2("h", 0.5, "16bit", moved, True), captures, expected)["error"]

    assert error(0.0) < min(error(0.1), error(-0.1))
    assert router.layers[0].proj_q is None


def test_captures_come_in_pairs(capsys):
    with pytest.raises(SystemExit):
        quality.parse(["--captures", "a.safetensors"])
    assert "belong together" in capsys.readouterr().err


def _qkv(tokens=320, heads=2, dim=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(1, tokens, heads, dim, generator=generator) for _ in range(3))


def test_sla_v1_keeps_all_blocks_exactly_and_adds_its_linear_branch_over_all_keys():
    q, k, v = _qkv()
    dense = names.dense(0, q, k, v)
    torch.testing.assert_close(fitted_sla.sparse_branch(q, k, v, 0.0), dense, atol=1e-5, rtol=1e-4)
    linear = fitted_sla.linear_branch(q, k, v)
    weights = q.softmax(-1).transpose(1, 2) @ k.softmax(-1).permute(0, 2, 3, 1)
    expected = (weights / weights.sum(-1, keepdim=True) @ v.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(linear, expected, atol=1e-5, rtol=1e-4)
    out = fitted_sla.attention(q, k, v, 0.0, fitted_sla.identity_projection(32, "cpu"))
    torch.testing.assert_close(out, dense + linear, atol=1e-5, rtol=1e-4)


def test_the_fitted_projection_is_the_best_linear_one_on_its_captures():
    captures = [Capture(0, *(x.transpose(1, 2) for x in _qkv(seed=seed)), (2, 10, 16)) for seed in range(3)]
    fitted = fitted_sla.fit_projection(captures, 0.6)

    def error(projection):
        total = 0.0
        for c in captures:
            q, k, v = (x.transpose(1, 2) for x in (c.q, c.k, c.v))
            total += float((fitted_sla.attention(q, k, v, 0.6, projection) - names.dense(0, q, k, v)).square().sum())
        return total

    best = error(fitted)
    zero = fitted_sla.Projection(torch.zeros(32, 32), torch.zeros(32))
    generator = torch.Generator().manual_seed(1)
    moved = fitted_sla.Projection(fitted.weight + 0.02 * torch.randn(32, 32, generator=generator), fitted.bias)
    assert best < error(zero) and best < error(moved)


def test_the_pooled_tail_is_exact_where_blocks_are_constant():
    q, k, v = _qkv(tokens=640)
    # every key block one key and one value: its mean is all there is to know
    k, v = (x[:, ::64].repeat_interleave(64, dim=1) for x in (k, v))
    out = pooled_tail.attention(q, k, v, 0.7)
    torch.testing.assert_close(out, names.dense(0, q, k, v), atol=1e-4, rtol=1e-3)


def test_the_pooled_tail_with_nothing_unselected_is_dense():
    q, k, v = _qkv(tokens=200)
    torch.testing.assert_close(pooled_tail.attention(q, k, v, 0.0), names.dense(0, q, k, v), atol=1e-5, rtol=1e-4)


def test_sol_attn_counts_its_diagonal():
    q, k, _ = _qkv(tokens=1280, heads=1)
    share = sol_attn.kept_share(q, k, 2)
    assert 3 / 20 - 2 / 400 <= share <= 5 / 20
    assert sol_attn.kept_share(q, k, sol_attn.equal_count(q, k, 0.4)) <= 0.4
    assert sol_attn.equal_count(q, k, 0.01) == 1


def test_ssim_is_one_for_equal_videos_and_falls_with_noise():
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(3, 2, 32, 40, generator=generator) * 2 - 1
    assert video_metrics.ssim(video, video) == pytest.approx(1.0)
    noise = torch.randn(video.shape, generator=generator)
    little, much = (video_metrics.ssim(video, video + scale * noise) for scale in (0.05, 0.5))
    assert 1 > little > much > 0


def test_ssim_of_constant_pictures_is_the_luminance_term():
    a, b = torch.full((3, 1, 16, 16), 0.0), torch.full((3, 1, 16, 16), 0.5)  # 0.5 and 0.75 in [0, 1]
    expected = (2 * 0.5 * 0.75 + 1e-4) / (0.5**2 + 0.75**2 + 1e-4)
    assert video_metrics.ssim(a, b) == pytest.approx(expected)


def _row(variant, error, precision="16bit"):
    return {"variant": variant, "sparsity": 0.9, "precision": precision, "error": error}


def test_bars_are_judged_per_sparsity_on_16_bit_rows():
    rows = [
        _row(names.STAGE_1, 0.2),
        _row(names.STAGE_1, 0.9, "int8"),
        _row(names.HEURISTIC, 0.1),
        _row(names.UNTRAINED, 0.3),
    ]
    rows += [_row(names.SOL_EQUAL, 0.35, None)]
    met = {sentence: state for sentence, state in quality_report.bars(rows)}
    assert [state for sentence, state in met.items() if names.HEURISTIC in sentence] == [False]
    assert [state for sentence, state in met.items() if names.SOL_EQUAL in sentence] == [True]
    assert len(met) == 3


def test_output_errors_weigh_layers_alike():
    q, k, v = (x.transpose(1, 2) for x in _qkv())
    captures = [Capture(0, q, k, v, (2, 10, 16)), Capture(1, q, k, 100 * v, (2, 10, 16))]

    def half_of_layer_0(layer, q, k, v):
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        return out * (0.5 if layer == 0 else 1.0)

    found = quality.output_errors(names.Variant("half", half_of_layer_0), captures, quality.dense_outputs(captures))
    assert found["error_by_layer"] == {"0": pytest.approx(0.5), "1": pytest.approx(0.0, abs=1e-6)}
    assert found["error"] == pytest.approx(0.5 / 2**0.5)
