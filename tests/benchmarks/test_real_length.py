"""The table at real length, at tiny size: every kind of row, what is left out is named, a second run goes on where one ended."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from benchmarks import quality_report, real_length
from benchmarks import quality_variants as names
from benchmarks.miniature_model import Miniature
from benchmarks.rivals import sol_attn
from miniature.lora import add_lora, lora_of, save_lora
from sla2_kernels import identity_router
from sla2_kernels.weights import RouterLayer


def _router(path):
    start = identity_router("wan", 2, 1, 128)
    layers = tuple(RouterLayer(None, None, torch.ones(1, 1, 1)) for _ in start.layers)
    replace(start, layers=layers, sparsities=(0.6,), keep_diagonal=True).save(path)


def _lora(path, size):
    model = add_lora(copy.deepcopy(Miniature.tiny("cpu").model), 2)
    lora = {
        key: value + size * torch.ones_like(value) * key.endswith("lora_up.weight")
        for key, value in lora_of(model.state_dict()).items()
    }
    save_lora(path, lora, torch.float32, "")


@pytest.fixture
def words(tmp_path, monkeypatch):
    """Arguments of a tiny run of 180 tokens with a router, a LoRA of each kind, and --out."""
    tiny = replace(Miniature.tiny("cpu"), size=(9, 96, 128))
    monkeypatch.setattr(Miniature, "tiny", lambda device: tiny)
    _router(tmp_path / "router.safetensors")
    _router(tmp_path / "stage2_router.safetensors")
    _lora(tmp_path / "stage2_lora.safetensors", 0.02)
    _lora(tmp_path / "few.safetensors", 0.01)
    return [
        "--tiny", "--device", "cpu", "--sparsities", "0.6", "--router", str(tmp_path / "router.safetensors"), "--lora",
        f"0.6={tmp_path / 'stage2_lora.safetensors'}", "--few-lora", f"1={tmp_path / 'few.safetensors'}", "--out", str(tmp_path / "out.json"),
    ]  # fmt: skip


def test_a_run_goes_on_where_it_ended_and_refuses_other_files(words, tmp_path, capsys):
    real_length.main([*words, "--only", "stage 1"])
    first = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["variant"], row["precision"], row["steps"]) for row in first] == [
        (names.DENSE, None, 2), (names.STAGE_1, "int8", 2), (names.STAGE_1 + names.FINE, "int8", 2), (names.DENSE, None, 1), (names.STAGE_1, "int8", 1), (names.STAGE_1, "16bit", 2)
    ]  # fmt: skip
    real_length.main([*words, "--only", "stage", "learned router, ratio fitted", "sol_attn"])
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["rows"][: len(first)] == first
    more = {(row["variant"], row["steps"]): row for row in content["rows"][len(first) :]}
    both = {(name, steps) for name in (names.STAGE_2, names.ROUTER_FITTED) for steps in (1, 2)}
    assert set(more) == {*both, *((name + names.FINE, 2) for name in (names.STAGE_2, names.ROUTER_FITTED))}
    assert {"1 steps, sol_attn, tau 1.3", "2 steps, skips 60% sol_attn, as many blocks in all"} <= set(
        content["absent"]
    )
    table = capsys.readouterr().out
    assert table.count("not measured, ") == 1 and "as many blocks in all;" in table  # one reason, one line
    for row in content["rows"]:
        assert ("validation_losses" in row) == (row["steps"] == 2)
        assert row["calls"] == (4 if row["steps"] == 2 else 2)  # two layers
        assert all(("psnr" in video) == (row["variant"] != names.DENSE) for video in row["videos"])
    # a LoRA changes the model, so its videos are not those of stage 1, whose router is equal
    at = {(row["variant"], row["precision"], row["steps"]): row for row in content["rows"]}
    one, two = at[names.STAGE_1, "int8", 2], at[names.STAGE_2, "int8", 2]
    assert one["videos"][0]["psnr"] > two["videos"][0]["psnr"]
    # the same choice of blocks, with a ratio fitted to the call instead of an arbitrary one
    assert at[names.ROUTER_FITTED, "int8", 2]["error"] < one["error"]

    (tmp_path / "docs.md").write_text("a\n<!-- real length begin -->\nold\n<!-- real length end -->\nb\n")
    real_length.main([*words, "--table", "--docs", str(tmp_path / "docs.md")])
    text = (tmp_path / "docs.md").read_text()
    assert quality_report.real_length_markdown(content) in text and "old" not in text and text.endswith("b\n")

    _lora(tmp_path / "stage2_lora.safetensors", 0.03)
    with pytest.raises(ValueError, match=r"rows of another --lora 0\.6"):
        real_length.main(words)


def test_dense_videos_are_kept_for_the_next_run_of_the_same_model(words, tmp_path, monkeypatch, capsys):
    words = [*words, "--dense-videos", str(tmp_path / "dense")]
    real_length.main([*words, "--only", "2 steps, skips 60% SLA2 stage 2 (with its LoRA and ratios) int8"])
    (first, second), kept = (
        json.loads((tmp_path / "out.json").read_text())["rows"][:2],
        sorted((tmp_path / "dense").iterdir()),
    )
    assert [path.name.partition("_steps_")[0] for path in kept] == ["1", "2"]  # of a model each
    (tmp_path / "out.json").unlink()
    sample, sampled = real_length.Run.sample, []

    def count(self, number, attention):
        sampled.append(attention)
        return sample(self, number, attention)

    monkeypatch.setattr(real_length.Run, "sample", count)
    real_length.main([*words, "--only", "2 steps, skips 60% SLA2 stage 2 (with its LoRA and ratios) int8"])
    again = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row | {"seconds": 0} for row in again[:2]] == [row | {"seconds": 0} for row in (first, second)]
    # dense ones are sampled to record calls alone: of both numbers of steps, and with the LoRA
    assert len(sampled) == 4 and sorted((tmp_path / "dense").iterdir()) == kept
    whole = [path.read_bytes() for path in kept]
    kept[0].write_bytes(whole[0][:100])
    real_length.main([*words, "--shift", "3", "--out", str(tmp_path / "other.json"), "--only", "nothing"])
    assert len(list((tmp_path / "dense").iterdir())) == 4  # other noise levels, other videos
    assert "is no dense video" not in capsys.readouterr().out
    (tmp_path / "out.json").unlink()
    real_length.main([*words, "--only", "nothing"])
    assert f"{kept[0]} is no dense video" in capsys.readouterr().out
    assert [path.read_bytes() for path in kept] == whole
    with pytest.raises(SystemExit):
        real_length.main([*words[:-1], str(kept[0]), "--only", "nothing"])
    assert f"--dense-videos {kept[0]} is no folder" in capsys.readouterr().err


def test_sol_attn_runs_on_the_models_own_layout_at_an_equal_number_of_blocks(words, tmp_path, monkeypatch):
    seen = []

    def compiled(q, k, v, **options):
        assert all(x.is_contiguous() and x.shape == (1, 144, 1, 128) for x in (q, k, v))
        seen.append(options)
        return names.dense(0, q, k, v)

    monkeypatch.setattr(sol_attn, "load_compiled", lambda: compiled)
    real_length.main([*words, "--only", "sol_attn", "--sampling-steps", "2"])
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    found = {(row["variant"], row["steps"]): row for row in rows if row["variant"] != names.DENSE}
    assert set(found) == {(name, steps) for name in (names.SOL_EQUAL, names.SOL_TAU) for steps in (1, 2)}
    # of three blocks one and its neighbours: two at the ends, three in the middle, and one that top-k may add
    assert 7 / 9 <= found[names.SOL_EQUAL, 2]["kept"] <= 1 and found[names.SOL_TAU, 2]["kept"] is None
    assert {tuple(options) for options in seen} == {("topk_ratio",), ("tau",)} and {"tau": 1.3} in seen


def test_as_many_blocks_in_all_is_the_largest_count_that_keeps_no_more():
    torch.manual_seed(0)
    calls = [(torch.randn(1, 2560, 2, 32), torch.randn(1, 2560, 2, 32)) for _ in range(2)]
    ratio = names.equal_topk_ratio(0.7, calls)
    count = int(40 * ratio)
    kept = [sum(sol_attn.kept_share(q, k, number) for q, k in calls) / 2 for number in (count, count + 1)]
    assert kept[0] <= 0.3 < kept[1]
    assert int(40 * names.equal_topk_ratio(0.99, calls)) == 1


def test_recorded_calls_meet_both_halves_and_differ_from_caption_to_caption():
    kept = [real_length.kept_calls(40, 4, caption, True)[0] for caption in range(3)]
    assert len(set(sum(kept, []))) == sum(map(len, kept)) and all(3 <= len(calls) <= 4 for calls in kept)
    assert {call % 2 for call in kept[0]} == {0, 1}
    assert real_length.kept_calls(4, 4, 2, False)[0] == [0, 1, 2, 3]


def test_a_table_of_no_rows_leaves_the_document_alone(tmp_path):
    document = tmp_path / "docs.md"
    document.write_text("<!-- real length begin -->\nold\n<!-- real length end -->\n")
    options = ["--table", "--docs", str(document), "--out", str(tmp_path / "none.json"), "--device", "cpu"]
    with pytest.raises(SystemExit, match="none.json has no rows"):
        real_length.main(options)
    assert "old" in document.read_text()


def test_the_plan_has_every_row_once_and_the_main_ones_first():
    jobs = real_length.plan([0.97, 0.99, 0.9, 0.95], 20, [4, 8], 8, 2)
    assert len({job.key for job in jobs}) == len(jobs)
    assert jobs[0].variant == names.DENSE and jobs[1].sparsity == 0.97 and jobs[0].videos == jobs[1].videos == 8
    for sparsity in (0.99, 0.97, 0.95, 0.9):
        for name in (names.FITTED, names.UNTRAINED, names.STAGE_1, names.STAGE_2):
            assert {
                job.precision for job in jobs if (job.variant, job.sparsity, job.steps) == (name, sparsity, 20)
            } == {"int8", "16bit"}
        for name in (names.FITTED, names.UNTRAINED):
            assert any((job.variant, job.sparsity) == (name + names.OTHER_CARDS, sparsity) for job in jobs)
        for name in (names.STAGE_1, names.STAGE_2):
            assert any((job.variant, job.sparsity) == (name + names.FINE, sparsity) for job in jobs)
        rivals = {job.variant for job in jobs if job.sparsity == sparsity and job.steps == 20}
        assert {names.SOL_EQUAL, names.V1_FITTED, names.BLOCK_SPARSE} <= rivals
    assert all(job.videos == 8 and not job.loss for job in jobs if job.steps in (4, 8))


def test_a_fitted_ratio_is_kept_for_three_more_steps_of_a_long_run(monkeypatch):
    fits = []
    fit = names.fitted_attention
    monkeypatch.setattr(names, "fitted_attention", lambda *args, **options: fits.append(1) or fit(*args, **options))
    variant = names.fitted(0.5, "16bit")
    q, k, v = (torch.randn(1, 256, 1, 32) for _ in range(3))
    for steps, halves, calls, wanted in ((20, 2, 10, 4), (20, 1, 5, 2), (8, 2, 10, 10), (None, 1, 5, 5)):
        fits.clear()
        variant.begin(steps, halves)
        for _ in range(calls):
            variant(0, q, k, v)
        assert len(fits) == wanted


def test_the_table_has_the_spread_and_the_multiple_of_denses_loss():
    def row(variant, losses, error, **videos):
        return {
            "variant": variant, "sparsity": None, "precision": None, "steps": 20, "error": error, "kept": None,
            "error_by_caption": {"0": error, "1": error + 0.2}, "validation_losses": losses,
            "videos": [{"frames_right": share, "passed": share == 1, **videos} for share in (1.0, 0.5)],
        }  # fmt: skip

    rows = [row(names.SOL_TAU, [0.2, 0.3], 0.1, psnr=20.0, ssim=0.5), row(names.DENSE, [0.1, 0.1], 0.0)]
    table = quality_report.real_length_markdown({"rows": rows, "absent": {}, "left": 3}).splitlines()
    assert table[3] == (
        "| 20 | - | sol_attn, tau 1.3 | - | 0.1000 ± 0.1414 | 0.2500 | 2.50 ± 0.71 | 20.0 ± 0.0 | 0.500 ± 0.000 | 0.75 ± 0.35 | 1 of 2 | - |"
    )
    assert table[-1].startswith("- 3 rows are left")
