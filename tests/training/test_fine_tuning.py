"""The optimisation steps of a LoRA and its ratios: what a bad number undoes, and that a small problem is solved."""

import math

import pytest
import torch

from sla2_training import FineTuning, TrainingError


def tuning(steps=40):
    lora, ratio = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    return FineTuning([lora], [ratio], steps=steps, learning_rate=0.05), lora, ratio


def step(tuned, lora, ratio):
    loss = (lora.square() + (ratio - 0.9).square()).mean()
    loss.backward()
    tuned.update(float(loss.detach()))


def test_the_loss_falls_and_lora_and_ratios_move_at_their_own_rates():
    tuned, lora, ratio = tuning()
    for number in range(40):
        step(tuned, lora, ratio)
        assert tuned.done == number + 1 and lora.grad is None
    assert tuned.losses[-1] < 0.2 * tuned.losses[0]
    first, _, _ = tuning()
    (group, own) = first.optimiser.param_groups
    assert (group["base"], own["base"]) == (0.05, 0.01)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_number_that_is_not_finite_takes_back_the_step_that_led_to_it(bad, where):
    tuned, lora, ratio = tuning()
    step(tuned, lora, ratio)
    good = lora.detach().clone(), ratio.detach().clone()
    step(tuned, lora, ratio)
    lora.grad = torch.full((3,), bad if where == "gradient" else 1.0)
    with pytest.raises(TrainingError, match=rf"stopped at step 2: the {where} is not finite\. Lower learning_rate"):
        tuned.update(bad if where == "loss" else 1.0)
    assert torch.equal(lora, good[0]) and torch.equal(ratio, good[1])
    assert tuned.done == 1 and lora.grad is None


def test_a_bad_first_step_leaves_everything_as_it_was():
    tuned, lora, ratio = tuning()
    with pytest.raises(TrainingError, match="stopped at step 0"):
        tuned.update(math.nan)
    assert torch.equal(lora, torch.ones(3)) and torch.equal(ratio, torch.ones(3)) and tuned.losses == []
