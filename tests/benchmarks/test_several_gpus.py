"""The script for several GPUs with two processes on a CPU: what it finds out, not how fast."""

import json

import pytest

from benchmarks import several_gpus
from benchmarks.several_gpus_operator import WAYS, in_order
from benchmarks.several_gpus_step import step_table, transformer
from benchmarks.several_gpus_training import blocks_wait_on, training_table


def run(tmp_path, monkeypatch, *arguments):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "several.json"
    several_gpus.main(["--device", "cpu", "--tiny", "--out", str(out), *arguments])
    return json.loads(out.read_text())


def test_attention_of_two_processes_is_that_of_one(tmp_path, capfd, monkeypatch):
    found = run(tmp_path, monkeypatch, "--processes", "2", "--parts", "attention")["attention"]
    ways = [(row["precision"], row["exchange"], row["groups"], row["transfer"]) for row in found["2"]]
    assert ways == [way for way in WAYS if way[-1] == "nccl"]
    for row in found["2"]:
        assert row["equal"] == (row["exchange"] == "16bit") and row["ms_exchange"] > 0
        assert row["error"] < 0.05
    printed = capfd.readouterr().out
    assert "| 2 | 16bit | 16bit | 1 | nccl |" in printed
    assert "no rows by copies: the tensors are on cpu" in printed


def test_a_timeline_has_what_the_call_does_in_order(tmp_path, capfd, monkeypatch):
    rows = run(tmp_path, monkeypatch, "--processes", "2", "--parts", "timeline", "--groups", "2")["timeline"]["2"]
    starts = [row["start_us"] for row in rows]
    assert starts == sorted(starts) and starts[0] == 0
    assert [row["name"] for row in rows].count("gloo:all_to_all") == 4
    assert "start us | us | stream | idle us | what" in capfd.readouterr().out


def test_idle_time_is_counted_by_stream():
    rows = in_order([(30.0, 5.0, 7, "c"), (10.0, 4.0, 7, "a"), (12.0, 9.0, 8, "b")])
    assert [(row["name"], row["start_us"], row["idle_us"]) for row in rows] == [("a", 0, 0), ("b", 2, 0), ("c", 20, 16)]


def test_one_process_plays_each_of_several(tmp_path, capfd, monkeypatch):
    rows = run(tmp_path, monkeypatch, "--processes", "1", "--parts", "messages")["messages"]["1"]
    assert [(row["processes"], row["exchange"]) for row in rows] == [(p, e) for p in (2, 4) for e in ("16bit", "8bit")]
    for row in rows:
        assert row["same_selection"] and row["error"] < 1.1 * row["error_of_one"]
    assert "| 4 | 8bit |" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["--processes", "1"], "it needs at least two"), (["--parts", "attention,stpe"], "got 'stpe'")],
)
def test_bad_arguments_are_told(capsys, arguments, told):
    with pytest.raises(SystemExit):
        several_gpus.parse(["--processes", "2", *arguments])
    assert told in capsys.readouterr().err


def test_with_four_gpus_two_are_measured_too():
    assert several_gpus.counts(4, "step") == [2, 4] and several_gpus.counts(6, "stage2") == [1, 2, 4, 6]
    assert several_gpus.counts(4, "attention") == [2, 4] and several_gpus.counts(2, "messages") == [1]


def test_blocks_that_will_be_split_do_not_stay_where_they_are_made():
    with blocks_wait_on("meta"):
        model = transformer(2, "cpu", tiny=True)
    assert {p.device.type for p in model.blocks.parameters()} == {"meta"}
    assert {p.device.type for n, p in model.named_parameters() if not n.startswith("blocks.")} == {"cpu"}
    assert {p.device.type for p in transformer(1, "cpu", tiny=True).parameters()} == {"cpu"}


def test_tables():
    runs = {
        1: {"losses": {"0": 0.5, "1": 0.4}, "seconds_per_step": 0.2, "tokens_per_second": 100.0, "bytes": 2e9},
        2: {"losses": {"0": 0.5, "1": 0.41}, "seconds_per_step": 0.1, "tokens_per_second": 200.0, "bytes": 1e9},
    }
    assert training_table(runs).splitlines()[-1] == "| 2 | 0.100 | 200 | 1.0 | 2.5e-02 |"

    def row(seconds, **parts):
        return {"seconds": seconds, "parts": parts, "bytes": 2e9, "error": 0.0}

    ways = {"dense": row(8.0, rest=1.0), "SLA2": row(4.0, attention=0.5, exchange=0.0, rest=3.5)}
    shared = {"SLA2, two groups": row(2.5, attention=0.25, exchange=0.3, rest=1.8)}
    runs = {2: {"layers": 4, "alone": ways, "together": shared}, 4: {"layers": 4, "together": shared}}
    assert step_table(runs).splitlines()[-2:] == [
        f"| {count} | 4 | SLA2, two groups | 2.500 | 1.60x | 3.20x | attention 0.250, exchange 0.300, rest 1.800 | 2.0 | 0.0e+00 |"
        for count in (2, 4)
    ]
