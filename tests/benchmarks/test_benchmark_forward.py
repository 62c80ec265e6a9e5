"""The operator's benchmark at tiny shapes on the CPU: rows, checks, table, plots, phases."""

import json

import pytest
import torch

from benchmarks import breakdown, forward, inputs, ours, plot, results, table
from benchmarks.measure import Ceilings
from benchmarks.rivals import packages
from sla2_kernels import select_key_blocks

TINY = ["--device", "cpu", "--precisions", "16bit,int8"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "cpu.json"
    forward.main([*TINY, "--parts", "shapes", "--shapes", "tiny", "--sparsities", "0.75,0.5", "--out", str(path)])
    return path


def test_every_setting_has_a_checked_row(measured):
    content = results.load(measured)
    rows = content["rows"]
    settings = {(row["sparsity"], row["precision"], row["alpha"]) for row in rows}
    assert settings == {(s, p, a) for s in (0.75, 0.5) for p in ("16bit", "int8") for a in ours.ALPHAS}
    for row in rows:
        assert row["method"] == "sla2"
        assert row["passed"] and row["repeatable"] and 0 < row["relative_error"] <= ours.TOLERANCE[row["precision"]]
        assert row["ms"] > 0
    assert content["environment"]["torch"] == torch.__version__


def test_measuring_a_part_again_replaces_its_rows_and_keeps_the_others(measured, tmp_path):
    path = tmp_path / "again.json"
    path.write_bytes(measured.read_bytes())
    before = results.load(path)
    forward.main([*TINY, "--parts", "length", "--lengths", "1024", "--sparsities", "0.75", "--out", str(path)])
    forward.main([*TINY, "--parts", "length", "--lengths", "1024", "--sparsities", "0.5", "--out", str(path)])
    rows = results.load(path)["rows"]
    assert [row for row in rows if row["part"] == "shapes"] == before["rows"]
    assert {row["sparsity"] for row in rows if row["part"] == "length"} == {0.5}


def test_the_operator_is_timed_with_and_without_its_linear_branch(tmp_path, capsys):
    path = tmp_path / "cpu.json"
    forward.main(
        [*TINY[:-1], "16bit", "--parts", "branches", "--shapes", "tiny", "--sparsities", "0.75", "--out", str(path)]
    )
    rows = results.load(path)["rows"]
    assert [row["alpha"] for row in rows] == [*ours.ALPHAS, ours.NO_LINEAR_BRANCH]
    assert all(row["passed"] and row["ms"] > 0 for row in rows)
    assert "| **SLA2**, 16bit, no linear branch |" in capsys.readouterr().out


def test_a_wrong_output_fails_the_check(monkeypatch):
    q, k, v = inputs.make_inputs(inputs.SHAPES["tiny"], device="cpu")
    right = ours.sla2_attention
    monkeypatch.setattr(ours, "sla2_attention", lambda *args, **kwargs: right(*args, **kwargs) * 1.1)
    assert not ours.check(q, k, v, 0.75, "16bit", "learned").passed


def test_an_output_that_changes_between_runs_fails_the_check(monkeypatch):
    q, k, v = inputs.make_inputs(inputs.SHAPES["tiny"], device="cpu", dtype=torch.float32)
    right, calls = ours.sla2_attention, []

    def moving(*args, **kwargs):
        calls.append(1)
        return right(*args, **kwargs) + 1e-6 * len(calls)

    monkeypatch.setattr(ours, "sla2_attention", moving)
    found = ours.check(q, k, v, 0.75, "16bit", "learned")
    assert not found.repeatable and not found.passed


def _content(**changes):
    row = {
        "part": "shapes", "shape": "S", "data": "random", "tensor_bytes": 100, "tokens": 1024, "percent": 97.0,
        "sparsity": 0.97, "precision": None, "peak_bytes": None,
    }  # fmt: skip
    rows = [
        {**row, "method": packages.BASELINE, "sparsity": None, "ms": 20.0},
        {
            **row,
            "method": "sla2",
            "precision": "int8",
            "alpha": "learned",
            "ms": 1.0,
            "peak_bytes": 140,
            "passed": True,
        },
        {**row, "method": "a peer", "ms": None, "failed": "RuntimeError: too long"},
    ]
    rows[1] |= changes
    about = {"environment": {"card": "Test Card", "torch": "2.x"}, "absent": {"VSA": "ImportError: no module"}}
    return {"environment": about["environment"], "parts": {"shapes": about}, "rows": rows}


def test_the_table_shows_times_factors_memory_absent_and_failed_peers():
    text = table.markdown(_content())
    assert "| **SLA2**, int8, learned ratio | 1.00 ms (20.0x) |" in text
    assert "1.40 times one of them" in text
    assert "Not installed, so not timed: VSA (ImportError: no module)." in text
    assert "Failed: a peer at S, skips 97%: RuntimeError: too long." in text


def test_a_row_that_failed_its_check_is_no_number_of_the_table():
    text = table.markdown(_content(passed=False))
    assert "1.00 ms" not in text
    assert "Left out, because its output was wrong or not repeatable: **SLA2**, int8, learned ratio" in text


def test_a_table_of_nothing_says_what_to_do():
    with pytest.raises(ValueError, match="measure it first"):
        table.markdown({"parts": {}, "rows": [], "environment": {}})


def test_table_and_plots_come_from_the_file_alone(measured, tmp_path, capsys):
    content = results.load(measured)
    content["rows"] += [{**row, "part": part} for row in content["rows"] for part in ("length", "sparsity")]
    path = tmp_path / "r.json"
    path.write_text(json.dumps(content))
    forward.main(["--device", "cpu", "--table", "--plot", str(tmp_path / "docs"), "--out", str(path)])
    assert "| method | tiny, skips 75% | tiny, skips 50% |" in capsys.readouterr().out
    for name in ("length", "sparsity"):
        text = (tmp_path / "docs" / f"{name}.svg").read_text()
        assert text.startswith("<svg") and "SLA2, int8, learned ratio" in text and text.count("<polyline") == 4


def test_a_plot_of_one_point_and_of_nothing():
    assert "<polyline" in plot.draw({"SLA2": [(1024, 1.0)]}, "t", "tokens", log_x=True)
    with pytest.raises(ValueError, match="nothing to plot"):
        plot.draw({}, "t", "tokens", log_x=True)


@pytest.mark.parametrize("words", [["--parts", "shape"], ["--precisions", "int4"], ["--alphas", "guessed"]])
def test_unknown_words_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        forward.parse(words)
    assert "is not one of" in capsys.readouterr().err


def test_quick_times_one_shape_at_one_sparsity():
    args = forward.parse(["--quick", "--device", "cpu", "--out", "x.json"])
    assert (args.parts, args.shapes, args.sparsities) == (["shapes"], ["1.3B-480p"], [0.97])


@pytest.mark.parametrize(("name", "reason"), [("huge", "shape must be one of"), ("1000", "multiples of 1,024")])
def test_unknown_shapes_are_refused(name, reason):
    with pytest.raises(ValueError, match=reason):
        inputs.find_shape(name)


def test_inputs_are_views_as_comfyui_hands_them_and_repeat_by_seed():
    shape = inputs.SHAPES["tiny"]
    first, again = (inputs.make_inputs(shape, "clustered", device="cpu", seed=3) for _ in range(2))
    for x, y in zip(first, again, strict=True):
        assert x.shape == (1, shape.tokens, shape.heads, shape.head_dim)
        assert x.flatten(2).data_ptr() == x.data_ptr() and x.flatten(2).is_contiguous()
        assert torch.equal(x, y)


def _selected(kind, grid=(8, 16, 32)):
    shape = inputs.Shape("s", 2, grid, head_dim=64)
    q, k, _ = inputs.make_inputs(shape, kind, device="cpu")
    return select_key_blocks(q, k, sparsity=0.9, layout="BNHD").long()


def test_local_inputs_pick_blocks_near_the_query_block():
    def distance(kind):
        selected = _selected(kind)
        own = 2 * torch.arange(selected.shape[2])[:, None]
        return float((selected - own).abs().float().mean())

    assert distance("local") < 0.5 * distance("random")


def test_clustered_inputs_want_some_key_blocks_far_more_often_than_others():
    def most_wanted(kind):
        counts = torch.bincount(_selected(kind).flatten(), minlength=64).float()
        return float(counts.max() / counts.mean())

    assert most_wanted("clustered") > 1.3 * most_wanted("random")


def test_absent_peers_are_named(monkeypatch):
    def missing():
        raise ImportError("No module named 'sageattention'")

    monkeypatch.setattr(packages, "DENSE_PEERS", {"dense": lambda: lambda q, k, v: None, "Sage": missing})
    monkeypatch.setattr(packages, "SPARSE_PEERS", {"SLA": lambda: lambda sparsity: lambda q, k, v: None})
    methods, absent = packages.find_peers([0.97, 0.9])
    assert [(m.name, m.sparsity) for m in methods] == [("dense", None), ("SLA", 0.97), ("SLA", 0.9)]
    assert absent == {"Sage": "ImportError: No module named 'sageattention'"}


@pytest.mark.parametrize("backend", ["FlashAttention-2 (PyTorch)", "cuDNN attention (PyTorch)"])
def test_dense_peers_run_on_the_views_they_are_given(backend, monkeypatch):
    monkeypatch.setattr(packages, "sdpa_kernel", lambda _: torch.no_grad())
    q, k, v = inputs.make_inputs(inputs.SHAPES["tiny"], device="cpu", dtype=torch.float32)
    out = packages.DENSE_PEERS[backend]()(q, k, v)()
    expected = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * q.shape[-1] ** -0.5).softmax(-1) @ v.transpose(1, 2)
    torch.testing.assert_close(out, expected)


def test_phases_count_bytes_and_flops():
    shape = inputs.Shape("s", 2, (1, 16, 16), head_dim=64)  # 256 tokens: 2 query blocks, 4 key blocks
    work = breakdown.least_work(shape, 0.5, "16bit")
    assert work["pool"].bytes == 2 * 2 * 256 * 64 * 2 + 2 * (2 + 4) * 64 * 4
    assert work["score"].flops == 2 * 2 * 2 * 4 * 64
    assert work["loop"].flops == 4 * 2 * 256 * (2 * 64) * 64 + 2 * 2 * 256 * 64 * 64


def test_phase_rows_add_up_kernels_and_keep_unknown_ones():
    shape = inputs.SHAPES["14B-720p"]
    times = {"_pool": (0.6, 2), "_smooth": (0.1, 1), "_sparse_attention": (6.0, 4), "memset": (0.05, 1)}
    rows = breakdown.phase_rows(
        times, breakdown.least_work(shape, 0.97, "int8"), Ceilings(3e12, {"16bit": 8e14, "fp8": 1.4e15})
    )
    assert [row[0] for row in rows] == ["loop", "pool", "memset"]
    assert rows[1][1:3] == (0.7, 3)
    assert rows[0][4] == pytest.approx(1000 * breakdown.least_work(shape, 0.97, "int8")["loop"].flops / 1.4e15)
    assert "| loop | 6.000 | 4 |" in breakdown.table(rows)


def test_phases_need_a_gpu():
    with pytest.raises(ValueError, match="on a GPU"):
        breakdown.print_phases(inputs.SHAPES["tiny"], 0.5, "16bit", "cpu")
