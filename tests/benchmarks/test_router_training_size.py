"""The benchmark of router training on a tiny model: what it measures, and which models it is asked for."""

import json

import pytest

from benchmarks import router_training_size


def test_rows_with_the_largest_operations_of_a_step(tmp_path, capsys):
    out = tmp_path / "rows.json"
    router_training_size.main(["--tiny", "--device", "cpu", "--steps", "1", "--top", "3", "--out", str(out)])
    rows = json.loads(out.read_text())
    assert [row["per head"] for row in rows] == [True, False]
    for row in rows:
        assert row["seconds per layer and step"] > 0
        shares = [share for _, share, _, _ in row["largest operations"]]
        assert len(shares) == 3 and shares == sorted(shares, reverse=True) and sum(shares) < 1
    # projections of q and k and Adam's two moments, two heads
    assert rows[0]["bytes kept per layer, by the formula"] == 3 * 2 * 2 * 32 * 32 * 4
    assert capsys.readouterr().out.count('"model": "tiny"') == 2


def test_an_unknown_model_is_told(capsys):
    with pytest.raises(SystemExit):
        router_training_size.main(["--models", "H4", "--device", "cpu"])
    assert "--models must be part of one of these: MiniMax H3" in capsys.readouterr().err
