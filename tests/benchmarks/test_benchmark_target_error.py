"""The study of target_error: it runs the node's own hook, judges all rows, records, and replays what it recorded."""

import json

import pytest
import torch

from benchmarks import looking_cost, target_error, target_replay
from benchmarks.target_error import dense
from sla2_kernels.router import selected_block_count

BLOCKS = 5  # of 64 keys, in the tiny miniature


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """(row of figures, Replayed) of a tiny run of two steps."""
    folder = tmp_path_factory.mktemp("target_error")
    arguments = ["--tiny", "--device", "cpu", "--targets", "0.4", "--steps", "2"]
    target_error.main([*arguments, "--record", str(folder), "--out", str(folder / "found.json")])
    (recording,) = folder.glob("*.safetensors")
    (row,) = json.loads((folder / "found.json").read_text())["rows"]
    return row, recording


def test_a_run_is_judged_over_all_its_rows(study):
    row, _ = study
    assert row["tokens"] == 320 and row["dense calls"] == 0 and len(row["sparsities"]) == 2
    assert row["error"] == pytest.approx((sum(error**2 for error in row["error of steps"]) / 2) ** 0.5)
    assert row["error"] == pytest.approx((sum(error**2 for error in row["error of layers"]) / 2) ** 0.5)
    assert row["reported"] == pytest.approx(row["error"], rel=0.1) and row["error"] > 0.2


def test_the_recording_has_the_errors_that_the_run_had(study):
    row, path = study
    (recording,) = target_replay.load(path).values()
    count = selected_block_count(row["sparsities"][0], BLOCKS)
    rung = next(i for i, rung in enumerate(recording.rungs) if selected_block_count(rung, BLOCKS) == count)
    for squares in (recording.of_all[0, 0, ..., rung], recording.of_rows[0, ..., rung]):
        assert squares.mean().sqrt() == pytest.approx(row["error of steps"][0], rel=0.1)


def test_a_condensed_recording_replays_alike(study, tmp_path, capsys):
    _, path = study
    target_replay.main([str(path), "--condense", str(tmp_path / "small.safetensors")])
    target_replay.main([str(tmp_path / "small.safetensors"), "--targets", "0.4"])
    assert "target 0.4: " in capsys.readouterr().out
    ((name, small),), ((_, whole),) = (target_replay.load(p).items() for p in (tmp_path / "small.safetensors", path))
    assert name == path.stem and small.draws == target_replay.DRAWS
    for step in (0, 1):
        found, expected = (r.error(step, 0.6, 0, 0)[0] for r in (small, whole))
        torch.testing.assert_close(found, expected, rtol=0.01, atol=0.0)


def test_dense_attention_some_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(target_error, "AT_ONCE", 8 * 90 * 32)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 90, 2, 16, dtype=torch.float64) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(dense(q, k, v, torch.float64), expected)


def test_the_cost_of_looking_is_that_of_a_call_of_each_kind(monkeypatch, tmp_path):
    calls = []

    def made_once(call, device):
        calls.append(call)
        call()
        return 1.0

    monkeypatch.setattr(looking_cost, "median_ms", made_once)
    looking_cost.main(["--tiny", "--device", "cpu", "--out", str(tmp_path / "found.json")])
    nodes = [call.func for call in calls]
    for node, measured in zip(nodes, (0, 1, 1), strict=True):
        run = node.end()
        assert run.layers[1].sparse == 1 and (run.layers[1].attention_error is not None) == bool(measured)
    assert json.loads((tmp_path / "found.json").read_text())["shapes"].keys() == {"tiny"}


def test_the_cost_of_looking_names_the_kernels_that_it_adds():
    given = {"ms": 2.0, "host ms": 0.5, "kernels": {"loop": (1.0, 1.0), "add": (0.01, 2.0)}}
    looks = {"ms": 2.2, "host ms": 0.6, "kernels": {"loop": (1.0, 1.0), "add": (0.02, 3.0), "_row_sums": (0.15, 1.0)}}
    assert list(looking_cost.lines("14B", {"given": given, "measured": looks})) == [
        "14B, given: 2.000 ms; host 0.500 ms, 3 launches",
        "14B, measured: 2.200 ms, +10.0% of each call, +4.0% over 20 steps; host 0.600 ms, 5 launches",
        "     0.1500 ms more in 1 more launches of _row_sums",
        "     0.0100 ms more in 1 more launches of add",
    ]
