"""What SLA2 Compare makes of times and latents, and its search for the break-even length."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture
def comparison(pack_module):
    return pack_module("nodes.comparison.runs")


@pytest.fixture
def even(pack_module):
    return pack_module("nodes.comparison.break_even")


def measured(comparison, **changes):
    values = {
        "latent": torch.ones(4),
        "step_s": 2.0,
        "attention_s": 1.5,
        "sparse_calls": 0,
        "dense_calls": 90,
        "peak": None,
    }
    return comparison.Measured(**values | changes)


def test_data_says_speed_up_share_ceiling_and_error(comparison):
    sla2 = measured(
        comparison, latent=torch.tensor([1, 1, 1, 1.2]), step_s=0.8, attention_s=0.3, sparse_calls=90, dense_calls=0
    )
    data = comparison.comparison_data(measured(comparison), sla2, "card", "skips 90%, keeps 10%", (5376, 8192))
    rows = dict(data["rows"])
    assert data["headline"] == "SLA2 (skips 90%, keeps 10%) is 2.50x faster per step than dense"
    assert rows["attention's share of a dense step"] == "75%" and rows["ceiling (Amdahl's law)"] == "4.00x"
    assert rows["self-attention alone"] == "5.00x as fast" and rows["latent error, relative to dense"] == "0.1000"
    assert rows["seconds per step, SLA2"] == "0.800 (90 of 90 calls accelerated)"
    assert data["break_even"] == 5376 and rows["break-even on card"] == "5376 tokens"
    assert rows["attention error per call"] == "not measured"


def test_the_attention_error_is_in_the_runs_own_words(comparison):
    words = "target error 0.12, measured 0.117, sparsity 0.93 chosen"
    sla2 = measured(comparison, sparse_calls=90, error_words=words)
    data = comparison.comparison_data(measured(comparison), sla2, "card", "skips 93%", None)
    assert dict(data["rows"])["attention error per call"] == words


def test_the_latent_error_is_that_of_all_parts(comparison):
    """Video and sound come as one latent of two parts."""
    dense, sla2 = (
        SimpleNamespace(is_nested=True, unbind=lambda p=p: p)
        for p in ([torch.ones(3), torch.ones(1)], [torch.ones(3), torch.zeros(1)])
    )
    assert comparison.relative_error(sla2, dense) == "0.5000"


def test_slower_is_said_and_peaks_are_in_gib(comparison):
    sla2 = measured(comparison, step_s=4.0, peak=3 * 2**30, sparse_calls=90, dense_calls=0)
    data = comparison.comparison_data(measured(comparison, peak=2**30), sla2, "card", "skips 90%", (None, 4096))
    rows = dict(data["rows"])
    assert "2.00x slower" in data["headline"] and rows["peak memory, dense and SLA2"] == "1.00 and 3.00 GiB"
    assert rows["break-even on card"] == "none up to 4096 tokens: SLA2 was slower" and data["break_even"] is None


def test_where_nothing_ran_sparse_no_speed_is_claimed(comparison):
    """As beside a node that takes the attention away: what the clocks say is noise, or another node's doing."""
    none = measured(comparison, step_s=1.96, attention_s=0.0, dense_calls=0)
    data = comparison.comparison_data(measured(comparison, attention_s=0.0, dense_calls=0), none, "card", "", None)
    assert "no self-attention call reached SLA2" in data["headline"]
    found = comparison.comparison_data(measured(comparison), measured(comparison), "card", "", (None, 2))
    assert "none of 90 self-attention calls ran sparse" in found["headline"]
    assert found["rows"].pop() == ["break-even on card", "none up to 2 tokens: SLA2 was slower"], "timed apart"
    for said in (data, found):
        text = comparison.comparison_text(said).lower()
        assert not any(word in text for word in ("faster", "slower", "as fast", "ceiling", "share", "error", "nan"))
    line = comparison.line_to_paste("card", "WAN21", measured(comparison), measured(comparison), None, "torch 2.11")
    assert line == "to paste: card | WAN21 | none of 90 self-attention calls ran sparse | torch 2.11"


def test_what_was_not_measured_is_said_in_words(comparison):
    sparse = {"sparse_calls": 90, "dense_calls": 0}
    unclocked = measured(comparison, attention_s=0.0, **sparse)
    for latent, words in (
        (torch.zeros(4), "the dense latent is zero"),
        (torch.full((4,), float("nan")), "NaN or infinity"),
    ):
        dense = measured(comparison, latent=latent, attention_s=0.0, dense_calls=0)
        rows = dict(comparison.comparison_data(dense, unclocked, "card", "skips 90%", None)["rows"])
        assert rows["latent error, relative to dense"].startswith("not measured: ")
        assert words in rows["latent error, relative to dense"]
        assert rows["self-attention alone"] == rows["attention's share of a dense step"] == "not measured"
        assert rows["ceiling (Amdahl's law)"] == "not measured"


def test_attention_seconds_adds_up_calls_of_both_kinds(comparison):
    layer = SimpleNamespace(
        sparse=4, dense=SimpleNamespace(total=lambda: 2), milliseconds={"sparse": 10.0, "dense": 30.0}
    )
    assert comparison.attention_seconds(SimpleNamespace(layers={0: layer, 1: layer}), 4) == pytest.approx(0.05)


def test_the_first_step_is_left_out_and_one_step_is_refused(comparison):
    clock = comparison.StepClock(torch.device("cpu"), lambda: None)
    clock.ends = [10.0, 11.0, 12.5, 13.5]
    assert clock.seconds() == 1.0
    clock.ends = [10.0]
    with pytest.raises(ValueError, match="fewer than two steps"):
        clock.seconds()


@pytest.mark.parametrize(
    ("rows", "tokens"),
    [
        ([(1024, 1, 2), (2048, 4, 4.5), (4096, 16, 9)], None),
        ([(1024, 1, 0.5)], 1024),
        ([(1024, 1, 2), (2048, 4, 5)], "none"),
        # faster at one length by chance, slower again beyond it
        ([(1024, 1, 0.9), (2048, 4, 5)], "none"),
    ],
)
def test_break_even_is_interpolated_between_lengths(even, rows, tokens):
    found = even.break_even(rows)
    if tokens is None:
        assert 2048 < found < 4096 and found % 128 == 0
        slow, fast = math.log(4.5 / 4), math.log(9 / 16)
        assert abs(found - 2048 * 2 ** (slow / (slow - fast))) <= 128
    else:
        assert found == (None if tokens == "none" else tokens)


def test_lengths_double_until_clearly_faster_or_out_of_time(even, monkeypatch):
    monkeypatch.setattr(even, "_median_time", lambda call, device: call())
    rows = even.time_lengths(lambda n: lambda: n * n * 1e-9, lambda n: lambda: n * 4e-6, torch.device("cpu"))
    assert [tokens for tokens, *_ in rows] == [1024, 2048, 4096, 8192]
    rows = even.time_lengths(lambda n: lambda: n * 1e-3, lambda n: lambda: n * 1e-3, torch.device("cpu"), seconds=20)
    assert [tokens for tokens, *_ in rows] == [1024, 2048], "the next length would take 16 s each"


def test_beside_comfyuis_own_sparse_attention_it_says_which_is_faster(comparison, pack_module):
    dense, sla2 = measured(comparison), measured(comparison, step_s=0.5, sparse_calls=90, dense_calls=0)
    own = "ComfyUI's own sparse attention"

    rival = pack_module("nodes.comparison.rival").Rival

    def rows(found):
        return dict(comparison.comparison_data(dense, sla2, "card", "skips 90%", None, found)["rows"])

    slower = rows(rival("sol-attn", measured(comparison, step_s=0.75)))
    assert slower["which is faster"] == f"SLA2 is 1.50x faster per step than {own}, on card, for this model and size"
    assert slower[f"seconds per step, {own}"] == "0.750 (sol-attn)"
    assert slower["its latent error, relative to dense"] == "0.0000"
    faster = rows(rival("sol-attn", measured(comparison, step_s=0.4)))["which is faster"]
    assert faster.startswith(f"{own} is 1.25x faster per step than SLA2")
    assert rows(rival("sol-attn", None, "no kernels"))[own] == "not measured: no kernels"
    assert "which is faster" not in rows(None)
    line = comparison.line_to_paste("card", "WAN21", dense, sla2, rival("sol-attn", measured(comparison)), "torch 2.11")
    assert line.startswith(
        "to paste: card | WAN21 | seconds per step: dense 2.000, ComfyUI's own 2.000, SLA2 0.500 | latent"
    )


def test_comfyuis_own_node_is_put_on_with_its_defaults(pack_module, monkeypatch):
    rival, called = pack_module("nodes.compat.rival_attention"), []

    class Node:
        @classmethod
        def execute(cls, **inputs):
            called.append(inputs)
            return SimpleNamespace(args=("patched",))

    assert rival.rivals_node() is None
    monkeypatch.setitem(sys.modules, "nodes", SimpleNamespace(NODE_CLASS_MAPPINGS={"BlockSparseAttention": Node}))
    assert rival.rivals_node() is Node and rival.with_rival("model") == "patched"
    (inputs,) = called
    assert inputs["model"] == "model" and inputs["selection"] == {"selection": "sol-attn", "tau": 1.3}


def test_where_comfyuis_own_fails_the_rest_is_kept(pack_module, monkeypatch):
    compare = pack_module("nodes.comparison.rival")
    monkeypatch.setattr(compare, "with_rival", lambda model: model)

    def fails(name, model):
        raise RuntimeError("no <kernels>")

    assert compare.against_rival("model", fails).failure == "no \u2039kernels\u203a"
    assert compare.against_rival("model", lambda name, model: name).measured == "with ComfyUI's own sparse attention"
