"""What the calls of a LoRA training start from, beside sampling written out."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from sla2_training.draws import drawn, noise_like

SETTINGS = SimpleNamespace(seed=7, batch=2, shift=1.0, drop_caption=0.5)
UNGUIDED = SimpleNamespace(**{**vars(SETTINGS), "drop_caption": 0.0})
SIGMAS = torch.tensor([1.0, 0.8, 0.5, 0.0])


class Flow:
    """ComfyUI's CONST sampling with evenly spaced levels."""

    @staticmethod
    def noise_scaling(sigma, noise, latent):
        sigma = sigma.view(-1, 1, 1, 1, 1)
        return sigma * noise + (1 - sigma) * latent

    @staticmethod
    def percent_to_sigma(percent):
        return 1 - percent


@pytest.fixture
def states(pack_module):
    return pack_module("nodes.training.training_states")


def model(noisy, sigma, prompt, negative):
    """A velocity that depends on all that a state says."""
    return noisy.sin() * (1 + sigma) + 0.1 * prompt - 0.3 * float(negative)


def velocity(state):
    return model(state.noisy, state.sigma, state.prompt, state.negative)


@pytest.mark.parametrize(("cfg", "settings"), [(1.0, UNGUIDED), (5.0, SETTINGS)])
@pytest.mark.parametrize("sigmas", [SIGMAS, SIGMAS[1:]])
def test_own_steps_are_a_sampling_of_the_model(states, cfg, settings, sigmas):
    clean = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    own = states.OwnSteps(Flow, clean, settings, sigmas, cfg, velocity)
    met = []
    for step in range(5):
        for state in own.of(step):
            met.append(state)
            own.follow(state, velocity(state))
    assert len(met) == 5 * SETTINGS.batch and len({state.negative for state in met}) == (1 if cfg == 1 else 2)
    per_video = len(sigmas) - 1
    expected = []
    for number in range(-(-len(met) // per_video)):
        step, place = divmod(number * per_video, SETTINGS.batch)
        seed = drawn(settings, step, 2)[3][place]
        video = clean[number % 2 : number % 2 + 1]
        x = Flow.noise_scaling(sigmas[:1], noise_like(video, [int(seed)]), video)
        for level, following in itertools.pairwise(sigmas):
            expected.append((x, level, number))
            positive, negative = (model(x, level, number, kind) for kind in (False, True))
            x = x + (following - level) * (negative + cfg * (positive - negative))
    for state, (x, level, number) in zip(met, expected, strict=False):
        torch.testing.assert_close(state.noisy, x)
        assert state.sigma == level and state.prompt == number and state.truth is None


def test_measuring_takes_one_sampling_of_the_first_prompt_each_time(states):
    own = states.OwnSteps(Flow, torch.zeros(1, 4, 3, 2, 2), UNGUIDED, SIGMAS, 1.0, velocity)

    def measured():
        found = []
        for state in own.held_out():
            found.append(state)
            own.follow(state, velocity(state))
        return found

    before = measured()
    for state in own.of(0):
        own.follow(state, velocity(state))
    after = measured()
    assert len(before) == len(after) == 3
    assert all(torch.equal(a.noisy, b.noisy) and a.prompt == 0 for a, b in zip(before, after, strict=True))


def test_noise_levels_of_another_node_are_copied_without_their_gradients(states):
    theirs = SIGMAS.double().requires_grad_()
    own = states.OwnSteps(Flow, torch.zeros(1, 4, 3, 2, 2), UNGUIDED, theirs, 1.0, velocity)
    (state, _) = own.of(0)
    assert not state.noisy.requires_grad and state.noisy.dtype == state.sigma.dtype == torch.float32


def test_videos_with_noise_are_at_the_drawn_levels(states):
    clean = torch.randn(3, 4, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    noised = states.NoisedVideos(Flow, clean, SETTINGS)
    draw = zip(*drawn(SETTINGS, 4, 3), strict=True)
    for state, (index, level, negative, seed) in zip(noised.of(4), draw, strict=True):
        noise = noise_like(clean[:1], [int(seed)])
        torch.testing.assert_close(state.sigma, level[None])
        torch.testing.assert_close(state.noisy, torch.lerp(clean[index : index + 1], noise, level))
        torch.testing.assert_close(state.truth, noise - clean[index : index + 1])
        assert state.prompt == index and state.negative == negative


@pytest.mark.parametrize(
    ("sigmas", "words"),
    [
        (torch.tensor([]), "a list of two noise levels or more"),
        (torch.tensor([1.0]), "a list of two"),
        (torch.tensor([[1.0, 0.0]]), "a list of two"),
        (torch.tensor([1.0, float("nan"), 0.0]), "must fall"),
        (torch.tensor([0.0, 0.5, 1.0]), "must fall from step to step, from 1 or less to 0 or more, and they are 0, 0.5, 1."),
        (torch.tensor([14.6, 0.5, 0.0]), "must fall"),
        (torch.tensor([1.0, 0.5, 0.5, 0.0]), "must fall"),
        (torch.tensor([0.9, 0.5, 0.0]), "begin at 0.9, where another model ends: connect latents"),
    ],
)  # fmt: skip
def test_noise_levels_that_do_not_fit_are_one_sentence(states, sigmas, words):
    with pytest.raises(ValueError, match="SLA2 Train LoRA: sigmas") as refused:
        states.check_sigmas(sigmas, has_videos=False)
    assert words in str(refused.value)
    states.check_sigmas(SIGMAS[1:], has_videos=True)
