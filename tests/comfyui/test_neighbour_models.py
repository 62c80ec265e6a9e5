"""SLA2 beside stand-ins for other nodes that reach into a MODEL; what ran is counted on both sides, in one process for all.

The stand-ins keep the contracts of ComfyUI's Model Sparse Attention (0.35), of packs that replace a model's forward, its
self-attention or its classes, and of guiders that call a second model.
"""

import json
from pathlib import Path

import pytest
from tiny_wan import save_wan

from tooling.paths import ROOT

HERE = Path(__file__).parent
STEPS = 2
OURS = "ComfyUI's Model Sparse Attention is on this MODEL too: SLA2 was placed after it"
THEIRS = "ComfyUI's Model Sparse Attention was placed after SLA2 on this MODEL and runs in place of it"


@pytest.fixture(scope="module")
def probe(comfyui_path, comfy_scripts, tmp_path_factory):
    """What neighbour_probe.py found, by case."""
    weights = tmp_path_factory.mktemp("weights") / "tiny_wan.safetensors"
    save_wan(weights)
    done = comfy_scripts.run(HERE / "neighbour_probe.py", comfyui_path, ROOT, weights)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def found(probe, case):
    result = probe[case]
    if result is None:
        pytest.skip("this ComfyUI is too old for it")
    assert "error" not in result, result["error"]
    return result


@pytest.mark.parametrize(("model", "layers"), [("wan", 3), ("h3", 2)])
def test_of_two_sparse_attentions_the_one_placed_last_works(probe, model, layers):
    result = found(probe, f"core_sparse_on_{model}")
    ours = result["ours last"]
    # its kernel ran nowhere: not in our first step, and not in the layer that a setting keeps dense
    assert ours["core"] == 0 and ours["sparse"] == STEPS * (layers - 1)
    assert set(ours["dense"]) == {"dense_layers keeps this layer dense"}
    assert len(ours["notes"]) == 1 and ours["notes"][0].startswith(OURS)
    theirs = result["core last"]
    assert theirs["core"] == STEPS * layers and theirs["sparse"] == theirs["answered"] == 0
    assert len(theirs["notes"]) == 1 and theirs["notes"][0].startswith(THEIRS)
    assert set(theirs["dense"]) <= set(theirs["notes"])
    # H3's whole blocks are taken over, so that no call is there to count
    assert len(theirs["dense"]) == (STEPS * layers if model == "wan" else 0)
    assert "dense (" not in theirs["text"] and "advice" not in theirs["text"]


@pytest.mark.parametrize("model", ["wan", "h3"])
def test_with_stop_the_sparse_attention_that_would_not_run_stops(probe, model):
    result = found(probe, f"core_sparse_on_{model}")
    assert result["stop"].startswith(f"SLA2 stopped: {THEIRS}") and "on_unsupported" in result["stop"]
    assert result["core ran"] == 0 and result["ours stops"] is None
    # each sampling is a run that ended; H3 is called here without a sampler
    assert result["stopped runs"] == (2 if model == "wan" else 1) and result["each"]


def test_a_router_is_trained_on_dense_attention_beside_the_other_sparse_one(probe):
    assert found(probe, "a_router_trained_beside_core_sparse") == {"core": 0, "layers": 3}


def test_what_lies_below_the_other_sparse_attention_stays_and_what_holds_it_goes(probe):
    result = found(probe, "core_sparse_between_two_of_ours_and_another_pack")
    between = result["between"]
    # six cross-attentions, and two self-attentions that a setting keeps dense
    assert between["core"] == 0 and between["lower"] == 8 and between["sparse"] == 4
    held = result["held"]
    assert held["core"] == 0 and held["sparse"] == 6
    (note,) = held["notes"]
    assert note.startswith(OURS) and note.endswith("holder, which held its attention, went with it")


def test_a_pack_that_puts_itself_in_front_again_each_step_stays_below_us(probe):
    result = found(probe, "a_pack_that_puts_itself_in_front_again")
    assert result["sparse"] == 6 and result["dense"] == []
    (note,) = result["notes"]
    assert "on_top.override put itself in front of SLA2, which was placed after it" in note


@pytest.mark.parametrize("name", ["passes options", "passes none"])
def test_another_packs_forward_does_not_switch_us_off(probe, name):
    result = found(probe, "another_packs_forward")[name]
    assert result["sparse"] == 6 and result["dense"] == result["notes"] == [] and result["model calls"] == STEPS
    assert result["equal"]  # the bits of a run without the pack


def test_model_calls_that_another_packs_forward_answers_are_counted_and_named(probe):
    result = found(probe, "another_packs_forward")
    caching = result["caches"]
    assert caching["sparse"] == 3 and caching["answered"] == 0 and caching["model calls"] == 2
    (note,) = caching["notes"]
    assert note.startswith("1 of 2 model calls came to none of the self-attentions that SLA2 marked")
    assert note.endswith("pack_forward on diffusion_model.forward")
    assert "cache answered" not in caching["text"]
    assert "pack_forward on diffusion_model.forward" in result["stop"] and "on_unsupported" in result["stop"]


def test_a_model_that_is_called_past_all_wrappers_runs_dense_and_says_what_is_in_the_way(probe):
    result = found(probe, "a_guider_that_calls_the_model_itself")
    reasons = set(result["dense"]["dense"])
    assert len(result["dense"]["dense"]) == 3 and len(reasons) == 1
    (reason,) = reasons
    assert "called past SLA2's wrappers" in reason and reason.endswith("pack_forward on diffusion_model.forward")
    assert "passed through: 3" in result["dense"]["text"]  # the cross-attentions, and no call twice
    assert result["stop"] == f"SLA2 stopped in layer 0: {reason} (on_unsupported is set to stop)."


def test_a_step_cache_is_only_spoken_of_where_one_is(probe):
    result = found(probe, "model_calls_that_come_to_no_mark")
    blocks, two = result["blocks replaced"], result["two models"]
    assert blocks["answered"] == two["answered"] == 0
    assert not any("cache answered" in run["text"] for run in (blocks, two))
    (note,) = blocks["notes"]
    assert note.startswith("2 of 2 model calls came to none") and note.endswith("<lambda> in place of dit blocks")
    assert "in place of dit blocks" in result["blocks replaced, stop"]
    (note,) = two["notes"]
    assert two["sparse"] == 3 and note.endswith("they were calls of a model that SLA2 was not applied to")
    (note,) = result["marks taken off"]["notes"]
    assert "SLA2's marks are not on its layers: a later node took them off" in note


def test_another_packs_self_attention_forward_is_marked_as_well(probe):
    result = found(probe, "another_packs_self_attention")
    assert result["sparse"] == 6 and result["dense"] == result["notes"] == []


@pytest.mark.parametrize("what", ["model", "class", "part"])
def test_what_another_model_put_into_the_shared_one_is_not_taken_for_ours(probe, what):
    result = found(probe, "what_another_model_put_into_the_live_one")[what]
    assert result["facts"] and result["sparse"] == 6 and result["of the other"] is not None


def test_nothing_of_ours_is_left_in_a_model(probe):
    result = found(probe, "nothing_is_left_in_the_model")
    assert result["sparse"] == 6 and result["same"] and not result["left"] and result["plain again"]
    assert result["later class"] == STEPS  # a class that a pack swaps in later is the one that runs


def test_nothing_of_ours_is_left_where_the_self_attention_is_a_method(probe):
    result = found(probe, "nothing_is_left_where_the_self_attention_is_a_method")
    assert result["sparse"] > 0 and result["same"]
