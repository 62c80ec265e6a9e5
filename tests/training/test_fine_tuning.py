"""The optimisation steps of a LoRA and its ratios: what a bad number undoes, and that a small problem is solved."""

import math

import pytest
import torch

from sla2_training import FineTuning, TrainingError
from sla2_training.optimisers import optimisers, take_step


def tuning(steps=40, optimiser="adamw", learning_rate=0.05):
    lora, ratio = torch.nn.Parameter(torch.ones(1, 3)), torch.nn.Parameter(torch.ones(3))
    return FineTuning([lora], [ratio], steps=steps, learning_rate=learning_rate, optimiser=optimiser), lora, ratio


def step(tuned, lora, ratio):
    loss = (lora.square() + (ratio - 0.9).square()).mean()
    loss.backward()
    tuned.update(float(loss.detach()))


@pytest.mark.parametrize(("optimiser", "learning_rate"), [("adamw", 0.05), ("muon", 0.2)])
def test_the_loss_falls_and_lora_and_ratios_move_at_their_own_rates(optimiser, learning_rate):
    tuned, lora, ratio = tuning(optimiser=optimiser, learning_rate=learning_rate)
    for number in range(40):
        step(tuned, lora, ratio)
        assert tuned.done == number + 1 and lora.grad is None
    assert tuned.losses[-1] < 0.2 * tuned.losses[0]
    groups = [group for one in tuned.optimisers for group in one.param_groups]
    assert [group["base"] for group in groups] == [learning_rate, 0.01]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_number_that_is_not_finite_takes_back_the_step_that_led_to_it(bad, where):
    tuned, lora, ratio = tuning()
    step(tuned, lora, ratio)
    good = lora.detach().clone(), ratio.detach().clone()
    step(tuned, lora, ratio)
    lora.grad = torch.full((1, 3), bad if where == "gradient" else 1.0)
    with pytest.raises(TrainingError, match=rf"stopped at step 2: the {where} is not finite\. Lower learning_rate"):
        tuned.update(bad if where == "loss" else 1.0)
    assert torch.equal(lora, good[0]) and torch.equal(ratio, good[1])
    assert tuned.done == 1 and lora.grad is None


def test_a_bad_first_step_leaves_everything_as_it_was():
    tuned, lora, ratio = tuning()
    with pytest.raises(TrainingError, match="stopped at step 0"):
        tuned.update(math.nan)
    assert torch.equal(lora, torch.ones(1, 3)) and torch.equal(ratio, torch.ones(3)) and tuned.losses == []


def test_muon_turns_a_gradient_of_few_directions_into_equal_steps_in_all_and_leaves_the_ratios_to_adamw():
    torch.manual_seed(3)
    lora, ratio = torch.nn.Parameter(torch.zeros(8, 32)), torch.nn.Parameter(torch.zeros(3))
    both = optimisers("muon", [lora], [ratio], 1e-2, 1e-3)
    # singular values from 1 to 1e-2; a step of AdamW's size has a root mean square of 0.2 learning rates
    left, right = torch.linalg.qr(torch.randn(8, 8))[0], torch.linalg.qr(torch.randn(32, 8))[0]
    lora.grad, ratio.grad = left @ torch.diag(torch.logspace(0, -2, 8)) @ right.T, torch.tensor([3.0, -0.1, 1e-3])
    take_step(both, 1.0)
    sizes = torch.linalg.svdvals(lora.detach())
    assert sizes.max() < 2.5 * sizes.min() and lora.grad is None
    assert 0.1 < lora.detach().square().mean().sqrt() / (0.2 * 1e-2 * (32 / 8) ** 0.5 / 2) < 1.5
    torch.testing.assert_close(ratio.detach(), -1e-3 * torch.tensor([1.0, -1.0, 1.0]), rtol=1e-3, atol=0)


def test_an_optimiser_that_is_not_there_is_told(monkeypatch):
    with pytest.raises(ValueError, match="optimiser must be one of adamw, muon, got 'lion'"):
        optimisers("lion", [], [], 1.0, 1.0)
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match='Muon comes with PyTorch 2.9 and newer, this is .*: take "adamw"'):
        optimisers("muon", [], [], 1.0, 1.0)
