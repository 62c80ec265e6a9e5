"""The preset automatic: what it chooses for the runs that people have, and that a run follows it and says so."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

HEADS, DIM = 2, 64
H3, LTX_1, LTX_2, WAN_480, WAN_720 = 42_000, 3_520, 14_080, 32_760, 75_600


@pytest.fixture
def automatic(pack_module):
    return pack_module("nodes.settings.automatic")


# (family, tokens, steps, begins_at) -> (sparsity, dense steps, words of the sentence)
RUNS = [
    (("minimax-h3", H3, 4, 0.0), (0.90, "step 1", "4 steps, from noise, 42,000 tokens, no trained ratio")),
    (("minimax-h3", H3, 8, 0.0), (0.90, "step 1", "measured on the miniature alone")),
    (("minimax-h3", H3, 20, 0.0), (0.90, "10%", "measured on the miniature alone")),
    (("ltx-2", LTX_1, 8, 0.0), (0.70, "step 1", "3,520 tokens")),
    (("ltx-2", LTX_2, 3, 0.52), (0.80, "none", "continuing a latent")),
    (("wan", WAN_480, 2, 0.0), (0.90, "step 1", "2 steps, from noise")),
    (("wan", WAN_480, 2, 0.58), (0.90, "none", "2 steps, continuing a latent")),
    (("wan", WAN_480, 10, 0.0), (0.90, "10%", "10 steps")),
    (("wan", WAN_720, 1, 0.0), (0.90, "step 1", "1 step, from noise")),
    (("wan", 8_400, 30, 0.0), (0.70, "10%", "for wan")),
    (("qwen-image", 32_768, 4, 0.0), (0.70, "step 1", "for qwen-image")),
    (("wan", WAN_480, None, None), (0.90, "10%", "an unknown number of steps")),
    (("wan", None, 4, 0.0), (0.70, "step 1", "4 steps, from noise, no trained ratio")),
]


@pytest.mark.parametrize(("run", "expected"), RUNS)
def test_what_it_chooses(automatic, run, expected):
    plan = automatic.plan_of(automatic.RunFacts(*run))
    dense = {(): "none", (automatic.DENSE_FIRST_STEP,): "step 1", (automatic.DENSE_START,): "10%"}
    sparsity, dense_steps, words = expected
    assert (plan.sparsity, dense[plan.schedule]) == (sparsity, dense_steps)
    assert words in plan.sentence and f"chose sparsity {sparsity:g}" in plan.sentence


@pytest.mark.parametrize(
    ("trained", "tokens", "sparsity"),
    [
        ((0.97, 0.95, 0.9, 0.85), WAN_720, 0.97),
        ((0.97, 0.95, 0.9, 0.85), WAN_480, 0.95),
        ((0.97, 0.95, 0.9, 0.85), LTX_2, 0.9),
        ((0.97, 0.95), 8_400, 0.95),
        ((), WAN_720, 0.90),
    ],
)
def test_a_trained_router_keeps_to_what_it_was_trained_for(automatic, trained, tokens, sparsity):
    plan = automatic.plan_of(automatic.RunFacts("wan", tokens, 30, 0.0, trained))
    assert plan.sparsity == sparsity
    assert (", a trained ratio;" in plan.sentence) == bool(trained)


def test_sla_weights_run_as_they_were_trained(automatic):
    plan = automatic.plan_of(automatic.RunFacts("wan", WAN_720, 4, 0.0, is_sla=True))
    assert plan[:2] == (0.9, ()) and "SLA weights" in plan.sentence


def test_a_target_takes_the_sparsitys_place(automatic):
    sentence = automatic.plan_of(automatic.RunFacts("wan", WAN_480, 4, 0.0, has_target=True)).sentence
    assert "leaves the sparsity to target_error, step 1 dense" in sentence and "0.97" not in sentence


def test_limits_are_those_of_the_quality_page(automatic):
    """Bold in docs/QUALITY.md's table by length."""
    measured = {8_400: 0.70, 14_196: 0.80, 32_760: 0.90, 75_600: 0.90}
    assert {tokens: automatic.untrained_limit(tokens) for tokens in measured} == measured


def sampled(b, pack_module, sigmas):
    """[sparsity of layer 0, None where it is dense] of one sampling, and its closed run."""
    steps = pack_module("nodes.attention.steps")
    run_dense = pack_module("nodes.attention.run_dense")
    b.hook.begin_run(None, lambda: {"noise": torch.ones(1, 4), "sigmas": sigmas})
    found = []
    for sigma in sigmas[:-1].tolist():
        call, _ = b.model_call(sigma, sample_sigmas=sigmas)
        try:
            found.append(steps.planned_sparsity(b.hook.settings, 0, call.step))
        except run_dense.RunDense:
            found.append(None)
    b.hook.end_run()
    return found, b.hook.runs.finished()[-1]


def test_each_stage_and_each_model_gets_its_own_plan(bench, pack_module):
    """One MODEL on two samplers, as LTX-2's stages share it: the first from noise, the second on the upsampled latent."""
    b = bench(grid=(16, 22, 40), plans_itself=True, sparsity=0.9)
    assert (
        sampled(b, pack_module, torch.tensor([1.0, 0.99, 0.98, 0.9, 0.7, 0.4, 0.2, 0.1, 0.0]))[0] == [None] + [0.8] * 7
    )
    assert sampled(b, pack_module, torch.tensor([0.5, 0.3, 0.1, 0.0]))[0] == [0.8] * 3
    many = torch.linspace(1, 0, 21)
    assert sampled(b, pack_module, many)[0] == [None] * 2 + [0.8] * 18


def test_the_run_says_what_was_chosen_once_something_ran_sparse(bench, pack_module, qkv):
    b = bench(plans_itself=True, sparsity=0.9)
    sigmas = torch.tensor([1.0, 0.5, 0.0])
    _, run = sampled(b, pack_module, sigmas)
    assert run.notes == {}, "nothing ran sparse: the reasons say why"
    b.hook.begin_run()
    for sigma in sigmas[:-1].tolist():
        b.model_call(sigma, sample_sigmas=sigmas)
        b.attend(*qkv, heads=HEADS)
    b.hook.end_run()
    run = b.hook.runs.finished()[-1]
    assert run.layers[0].dense == {"the preset automatic keeps this step dense": 1} and run.layers[0].sparse == 1
    (note,) = run.notes
    assert note.startswith(
        "preset automatic chose sparsity 0.7, step 1 dense, for wan: 2 steps, from noise, 300 tokens"
    )
    outcome = pack_module("nodes.runs.outcome").outcome(b.hook, run)
    assert any("preset automatic chose" in sentence for sentence in outcome["reasons"])
    assert pack_module("nodes.runs.report_text").report_data(b.hook, run)["sparsity_setting"] == 0.7


def test_the_length_is_known_before_the_model_is_called(bench, pack_module):
    """What a run keeps on the device is made then, for the sparsity that its calls will ask for."""
    b = bench(grid=(16, 22, 40), plans_itself=True, sparsity=0.9)
    b.hook.begin_run()
    options = {"sigmas": torch.tensor([0.5]), "sample_sigmas": torch.tensor([0.5, 0.0])}
    b.hook.before_model(torch.device("cpu"), options, dict)
    assert {key[2] for key in b.hook.weights._calls} == {0.8}
    b.hook.end_run()


def test_a_call_whose_length_is_unknown_is_planned_again(bench, pack_module):
    b = bench(grid=(16, 22, 40), plans_itself=True, sparsity=0.9)
    b.hook.begin_run()
    options = {"sigmas": torch.tensor([0.5]), "sample_sigmas": torch.tensor([0.5, 0.0])}

    def unreadable():
        raise KeyError("x")

    unknown = dataclasses.replace(b.hook.facts, layout=SimpleNamespace(grid=lambda *_: unreadable()))
    known, b.hook.facts = b.hook.facts, unknown
    b.hook.before_model(torch.device("cpu"), options, dict)
    assert b.run.plan.sparsity == 0.7
    b.hook.facts = known
    b.model_call(0.5, sample_sigmas=options["sample_sigmas"])
    assert b.run.plan.sparsity == 0.8
    b.hook.end_run()
