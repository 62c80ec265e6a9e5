"""The script for several GPUs with two processes on a CPU: what it finds out, not how fast."""

import json

from benchmarks import several_gpus


def test_attention_of_two_processes_is_that_of_one(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "several.json"
    several_gpus.main(["--device", "cpu", "--tiny", "--processes", "2", "--parts", "attention", "--out", str(out)])
    found = json.loads(out.read_text())["attention"]
    assert set(found) == {"int8", "16bit"}
    assert all(row["error"] == 0 and row["ms_exchange"] > 0 for row in found.values())
    assert "| 16bit |" in capfd.readouterr().out


def test_tables():
    runs = {
        1: {"losses": {"0": 0.5, "1": 0.4}, "seconds_per_step": 0.2, "tokens_per_second": 100.0, "bytes": 2e9},
        2: {"losses": {"0": 0.5, "1": 0.41}, "seconds_per_step": 0.1, "tokens_per_second": 200.0, "bytes": 1e9},
    }
    assert several_gpus.training_table(runs).splitlines()[-1] == "| 2 | 0.100 | 200 | 1.0 | 2.5e-02 |"
