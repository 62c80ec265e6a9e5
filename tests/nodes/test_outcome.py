"""What the node says after a run: time saved, share skipped, error; and of a node that another one replaced."""

from types import SimpleNamespace

import pytest
import torch

HEADS = 2


def row(calls, dense_calls=0, **milliseconds):
    reasons = {"dense_layers keeps this layer dense": dense_calls} if dense_calls else {}
    return {"layer": 0, "sparse": calls, "dense": reasons, "milliseconds": milliseconds}


@pytest.fixture
def time_saved(pack_module):
    return pack_module("nodes.runs.time_saved")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        # a layer's own dense calls, else the mean of those that had some
        ([row(100, 2, sparse=10.0, dense=50.0)], "saved 4 s of attention in this run"),
        ([row(0, 5, dense=60.0), row(100, sparse=10.0)], "saved 5 s of attention in this run"),
        ([row(1000, 9, sparse=10.0, dense=390.0)], "saved 6 min 20 s of attention in this run"),
        ([row(100, 2, sparse=9.0, dense=5.0)], "attention took 0.4 s longer than dense in this run"),
        ([row(100, sparse=10.0)], None),
        ([row(0, 9, dense=10.0)], None),
        ([row(100, 2, dense=10.0)], None),
    ],
)
def test_the_time_saved_is_the_runs_own(time_saved, rows, words):
    assert time_saved.saved_in_words({"layers": rows}) == words


def ended(bench, qkv, dense_layers=frozenset({1})):
    b = bench(sparsity=0.75, minimum_tokens=0, dense_layers=dense_layers)
    b.hook.begin_run()
    b.model_call()
    for layer in (0, 1):
        b.attend(*qkv, heads=HEADS, layer=layer)
    b.hook.end_run()
    return b, b.hook.runs.finished()[-1]


def test_the_headline_is_time_share_and_error(bench, qkv, pack_module):
    b, run = ended(bench, qkv)
    said = pack_module("nodes.runs.outcome").outcome(b.hook, run)
    time, share, error = said["headline"].split(" · ")
    assert "of attention in this run" in time or "longer than dense in this run" in time
    assert share.startswith("skips ") and error.startswith("attention error 0.")
    counted, faster = said["detail"].split(" · ")
    assert counted == "1 of 2 attention calls accelerated" and faster.endswith(" per call")
    report = pack_module("nodes.runs.report_text").report_text(b.hook, run).splitlines()[0]
    assert time in report and error in report


def test_where_nothing_ran_sparse_the_headline_counts(bench, qkv, pack_module):
    b, run = ended(bench, qkv, frozenset({0, 1}))
    said = pack_module("nodes.runs.outcome").outcome(b.hook, run)
    assert (said["headline"], said["detail"]) == ("0 of 2 attention calls accelerated", "")


def test_a_router_used_outside_its_range_is_said_on_the_node(bench, qkv, pack_module):
    b, run = ended(bench, qkv)
    note = (
        "the router was trained for sparsity 0.85, 0.97 and this run uses 0.75: the ratios trained for 0.85 are taken"
    )
    settings = SimpleNamespace(sparsities=[0.75], precision="auto")
    router = SimpleNamespace(sparsities=[0.85, 0.97], precision=None)
    assert pack_module("nodes.attention.layer_weights").router_notes(settings, router) == [note]
    run.note(note)
    assert note in pack_module("nodes.runs.outcome").outcome(b.hook, run)["reasons"]


def test_the_first_of_two_says_that_the_second_replaced_it(pack_module, monkeypatch):
    module, sent = pack_module("nodes.runs.outcome"), []
    monkeypatch.setattr(module, "send_event", lambda kind, node, data: sent.append((kind, node, data["headline"])))
    first, second = (SimpleNamespace(on_run_end=None) for _ in range(2))
    module.show_outcomes(first, "3")
    assert sent == []
    module.show_outcomes(second, "5", first)
    assert sent == [("outcome", "3", module.REPLACED)] and "only the last one on a MODEL wire counts" in module.REPLACED


def test_a_line_to_paste_has_what_was_measured_and_nothing_else(bench, qkv, pack_module):
    paste, report = pack_module("nodes.runs.to_paste"), pack_module("nodes.runs.report_text")
    b, run = ended(bench, qkv)
    line = paste.line_to_paste(run, report.report_data(b.hook, run), "WAN21", torch.device("cpu"))
    assert line.startswith("to paste: cpu | WAN21 | 300 tokens | 1 of 2 calls sparse | ")
    for words in (" skipped in 16bit | dense ", " ms, SLA2 ", " | attention error 0.", " s in 1 model calls | torch "):
        assert words in line
    b, run = ended(bench, qkv, frozenset({0, 1}))
    line = paste.line_to_paste(run, report.report_data(b.hook, run), "WAN21", torch.device("cpu"))
    assert "SLA2 " not in line and "error" not in line and "tokens" not in line
