"""Error against time: rows of both files are joined by method and sparsity, equal errors lie between measured points."""

import json

import pytest
import torch

from benchmarks import error_against_time, readme
from benchmarks import quality_variants as names
from benchmarks.consumer import further_calls


def _error(variant, sparsity, precision, error, steps=20):
    return {"variant": variant, "sparsity": sparsity, "precision": precision, "error": error, "steps": steps}


def _time(method, setting, sparsity, ms, part="sm_90", **more):
    row = {"part": part, "shape": "H3", "method": method, "setting": setting, "sparsity": sparsity, "ms": ms}
    return row | more


ERRORS = [
    _error(names.FITTED, 0.97, "int8", 0.16),
    _error(names.FITTED, 0.9, "int8", 0.04),
    _error(names.FITTED + names.OTHER_CARDS, 0.97, "int8", 0.2),
    _error(names.FITTED, 0.9, "int8", 0.5, steps=4),
    _error(names.FITTED, 0.9, "16bit", 0.6),
    _error(names.SOL_EQUAL, 0.97, None, 0.08),
    _error(names.SOL_TAU, None, None, 0.02),
    _error(names.BLOCK_SPARSE, 0.97, "int8", 0.3),
]
TIMES = [
    _time("sla2", "a ratio per head, 64 queries", 0.97, 4.0),
    _time("sla2", "a call that fits, 64 queries", 0.97, 8.0),
    _time("sla2", "a ratio per head, 64 queries", 0.9, 20.0),
    _time("sla2", "a call that fits, 64 queries", 0.9, 20.0),
    _time("sla2", "a ratio per head", 0.97, 7.0, part="sm_89"),
    _time("sla2", "a call that fits", 0.97, 7.0, part="sm_89"),
    _time("sla2", "top-k only", 0.97, 3.0, passed=False),
    _time("sol_attn", "equal share", 0.97, 20.0),
    _time("sol_attn", "tau 1.3", None, 30.0),
]


def test_rows_are_joined_and_equal_errors_compared():
    found = error_against_time.points({"rows": ERRORS}, {"rows": TIMES})
    assert found == {
        ("sm_90", "H3"): {
            # one call in four fits
            "SLA2 without a router, fitted": [(5.0, 0.16, 0.97), (20.0, 0.04, 0.9)],
            "sol_attn, as many blocks in all": [(20.0, 0.08, 0.97)],
            "sol_attn, tau 1.3": [(30.0, 0.02, None)],
        },
        ("sm_89", "H3"): {"SLA2 without a router, fitted": [(7.0, 0.2, 0.97)]},
    }
    line = found["sm_90", "H3"]["SLA2 without a router, fitted"]
    assert error_against_time.time_at(line, 0.08) == pytest.approx(10.0)
    assert error_against_time.time_at(line, 0.02) is None
    table = error_against_time.markdown(found)
    assert "| 97% | 20.00 | 0.080 | 10.00 ms (2.00x), out of range |" in table
    assert "| - | 30.00 | 0.020 | out of range, out of range |" in table


def test_the_plot_is_made_where_both_were_measured(tmp_path):
    assert error_against_time.plot(tmp_path) is None and "error_time.svg" not in readme.plots([], tmp_path)
    (tmp_path / "real-length-card.json").write_text(json.dumps({"rows": ERRORS}))
    with pytest.raises(SystemExit):
        error_against_time.main(["--folder", str(tmp_path)])
    (tmp_path / "error-times-card.json").write_text(json.dumps({"rows": TIMES}))
    error_against_time.main(["--folder", str(tmp_path), "--out", str(tmp_path / "plot.svg")])
    text = (tmp_path / "plot.svg").read_text()
    assert readme.plots([], tmp_path)["error_time.svg"][0] == text
    assert text.count("<circle") == 5 and text.count("<polyline") == 4


def test_the_other_modes_that_are_timed_run():
    q, k, v = (torch.randn(1, 256, 2, 64) for _ in range(3))
    for call in further_calls(q, k, v, 0.5).values():
        assert call().shape == q.shape
