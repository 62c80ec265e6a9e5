"""128 and 64 query tokens per selection: the error in the same time, and the checks at tiny size."""

import pytest

from benchmarks import query_block
from benchmarks.inputs import Shape
from benchmarks.query_block import affordable, all_checks, check, error, tables


def test_errors_and_kept_shares_between_the_measured_ones():
    assert error("untrained", 128, 0.03) == pytest.approx(0.178) and error("trained", 64, 0.15) == pytest.approx(0.061)
    # a power of the kept share between two of them
    assert error("untrained", 128, (0.03 * 0.05) ** 0.5) == pytest.approx((0.178 * 0.140) ** 0.5)
    times = [8.0, 12.0, 20.0]
    assert [affordable(times, ms) for ms in (8.0, 10.0, 12.0, 16.0, 20.0, 24.0)] == pytest.approx(
        [0.03, 0.04, 0.05, 0.075, 0.1, 0.125]
    )


def test_in_the_same_time_64_has_the_error_of_the_table_over_that_of_128():
    times = {(block, sparsity): ms for block in (128, 64) for sparsity, ms in ((0.97, 8.0), (0.95, 12.0), (0.9, 20.0))}
    same, *_ = [line for line in tables({"as fast": times}).splitlines() if line.startswith("| untrained, 64 at 97%")]
    assert same == "| untrained, 64 at 97% | -18.0% (128 at 97.0%) |"


def test_the_checks_at_tiny_size(monkeypatch, capsys):
    monkeypatch.setattr(query_block, "CHECKED", Shape("tiny", 2, (2, 9, 10), head_dim=32))
    assert all_checks("cpu") and "ok: gradients, 64 query tokens" in capsys.readouterr().out
    monkeypatch.setitem(query_block.TOLERANCE, "int8", 0.0)
    assert not check("cpu", "int8", 64, "given") and "WRONG" in capsys.readouterr().out
