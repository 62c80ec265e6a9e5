"""The ablation script runs through at a tiny size, and its table says what its runs said."""

import json

import pytest

pytest.importorskip("peft")
pytest.importorskip("accelerate")

from benchmarks import stage2_miniature
from sla2_kernels import load_router


@pytest.mark.slow
def test_every_run_is_in_the_table(tmp_path, capsys):
    stage2_miniature.main(["--tiny", "--steps", "1", "--device", "cpu", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["run"] for row in rows] == [
        "stage 1",
        stage2_miniature.QAT,
        "stage 1, 16 bit",
        "stage 1 + 2, 16 bit",
        stage2_miniature.AFTERWARDS,
        "heuristic router",
        stage2_miniature.HEURISTIC,
    ]
    assert {row["precision"] for row in rows} == {"int8", "16bit"} and len({row["dense_flow"] for row in rows}) == 1
    assert rows[0]["distance"] > 0
    assert load_router(tmp_path / "97-0" / "router.safetensors").ratio(0, 0.97) is not None
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out


def test_the_share_of_the_gap_that_is_closed():
    rows = [
        {"run": run, "sparsity": 0.97, "flow": flow, "distance": 0.0, "dense_flow": 1.0}
        for run, flow in (("stage 1", 3.0), ("stage 1 + 2 (QAT)", 1.5))
    ]
    assert stage2_miniature.table(rows, [0.97]).splitlines()[-1] == "| stage 1 + 2 (QAT) | 1.50000 | 0.000000 | 75% |"
