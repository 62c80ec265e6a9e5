"""The script that finds the demo's sparsity: a tiny run, and the choice among what it measured."""

import json

import pytest

from benchmarks import demo_sparsity


def test_a_tiny_study_measures_every_number_of_blocks(tmp_path):
    out = tmp_path / "found.json"
    demo_sparsity.main(["--tiny", "--device", "cpu", "--out", str(out)])
    found = json.loads(out.read_text())
    assert [kept for kept, *_ in found["rows"]] == [1, 2, 3, 4] and found["tokens"] == 320
    errors = [error for *_, error in found["rows"]]
    assert errors == sorted(errors, reverse=True)
    # of 5 blocks, 97% leaves one
    assert errors[0] == pytest.approx(found["reference"]["error"]) and found["sparsity"] == 0.8


def test_the_fewest_blocks_that_are_accurate_enough_are_taken():
    rows = [[1, 0.9, 0.4], [2, 0.8, 0.2], [3, 0.7, 0.1]]
    assert [demo_sparsity.fewest_blocks(rows, error)[0] for error in (0.5, 0.2, 0.15, 0.05)] == [1, 2, 3, 3]
    assert [demo_sparsity.sparsity_of(kept, 19) for kept in (1, 7, 18)] == [0.94, 0.63, 0.05]
