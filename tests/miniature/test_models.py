"""The two models alone: shapes, the attention hook, folding of latent statistics, bad input."""

import pytest
import torch

from miniature import captions, vae, wan
from miniature.sample import noise_schedule, sample_latents


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return wan.WanModel(wan.WanConfig(num_layers=3, ffn_dim=64)).eval()


CONTEXT = captions.embed("two red balls bounce over tiles, camera still")


@torch.no_grad()
def test_attention_hook_sees_every_layer_and_can_replace_attention(model):
    x, t = torch.randn(1, 16, 2, 4, 6), torch.tensor([500.0])
    seen = []

    def record(layer, q, k, v):
        seen.append((layer, q.shape, k.shape, v.shape))
        return wan.dense_attention(layer, q, k, v)

    plain = model(x, t, CONTEXT)
    assert torch.equal(model(x, t, CONTEXT, record), plain)
    assert seen == [(i, *[(1, 12, 2, 128)] * 3) for i in range(3)]
    without = model(x, t, CONTEXT, lambda layer, q, k, v: torch.zeros_like(v))
    assert not torch.allclose(without, plain, atol=1e-3)


@torch.no_grad()
def test_rotation_depends_on_distance_only():
    table = wan.rope_table((4, 5, 6))
    cos, sin = (part.view(4, 5, 6, 1, 64) for part in table)
    q, k = torch.randn(1, 1, 1, 128), torch.randn(1, 1, 1, 128)

    def score(at, other):
        a = wan.apply_rope(q, (cos[at], sin[at]))
        b = wan.apply_rope(k, (cos[other], sin[other]))
        return (a * b).sum()

    torch.testing.assert_close(score((0, 1, 2), (2, 3, 1)), score((1, 2, 3), (3, 4, 2)), atol=1e-3, rtol=1e-4)
    assert (score((0, 1, 2), (2, 3, 1)) - score((0, 1, 2), (0, 1, 2))).abs() > 1e-2


def test_sizes_are_read_back_from_a_checkpoint(model):
    assert wan.WanConfig.from_state_dict(model.state_dict()) == model.config


def test_both_files_fit_the_budget_in_16_bit():
    count = sum(p.numel() for p in [*wan.WanModel().parameters(), *vae.WanVAE().parameters()])
    assert count * 2 < 22e6


def test_bad_sizes_say_what_to_do(model):
    with pytest.raises(ValueError, match="even sides"):
        model(torch.zeros(1, 16, 1, 3, 4), torch.zeros(1), CONTEXT)
    with pytest.raises(ValueError, match="multiple of 128"):
        wan.WanModel(wan.WanConfig(dim=100))
    with pytest.raises(ValueError, match="4n\\+1 frames"):
        vae.WanVAE(8).encode(torch.zeros(1, 3, 4, 16, 16))


@torch.no_grad()
def test_the_vae_is_causal():
    torch.manual_seed(0)
    model = vae.WanVAE(8)
    video = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    changed = video.clone()
    changed[:, :, 5:] = 0
    torch.testing.assert_close(model.encode(video)[:, :, :2], model.encode(changed)[:, :, :2])
    latents = torch.randn(1, 16, 3, 2, 2)
    torch.testing.assert_close(model.decode(latents)[:, :, :5], model.decode(latents[:, :, :2]))


@torch.no_grad()
@pytest.mark.parametrize("stacked", [False, True])
def test_folding_statistics_moves_latents_and_keeps_videos(stacked, monkeypatch):
    monkeypatch.setattr(vae.Kernels, "stack_frames", stacked)
    torch.manual_seed(0)
    model = vae.WanVAE(8)
    video = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    before, log_variance = model.posterior(video)
    picture = model.decode(before)
    mean, std = before.mean((0, 2, 3, 4)), before.std((0, 2, 3, 4))
    model.fold_statistics(mean, std)
    after, new_log_variance = model.posterior(video)
    normal = vae.normalise_latents(after)
    torch.testing.assert_close(normal.mean((0, 2, 3, 4)), torch.zeros(16), atol=1e-3, rtol=0)
    torch.testing.assert_close(normal.std((0, 2, 3, 4)), torch.ones(16), atol=1e-3, rtol=0)
    torch.testing.assert_close(model.decode(after), picture, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(vae.denormalise_latents(normal), after, atol=1e-5, rtol=1e-5)
    gain = torch.tensor(vae.LATENT_STD) / std
    torch.testing.assert_close(
        new_log_variance - log_variance,
        (2 * gain.log()).view(1, -1, 1, 1, 1).expand_as(log_variance),
        atol=1e-3,
        rtol=1e-3,
    )


def test_schedule_is_comfyui_s_shifted_flow():
    levels = noise_schedule(4, shift=8.0)
    assert levels.tolist() == pytest.approx([1.0, 0.96, 8 / 9, 8 / 11, 0.0], abs=1e-6)


def test_sampling_repeats_by_seed_and_obeys_guidance(model):
    options = {"shape": (1, 16, 1, 4, 4), "steps": 2}
    first = sample_latents(model, CONTEXT, seed=1, **options)
    assert torch.equal(first, sample_latents(model, CONTEXT, seed=1, **options))
    assert not torch.equal(first, sample_latents(model, CONTEXT, seed=2, **options))
    assert not torch.equal(first, sample_latents(model, CONTEXT, seed=1, cfg=1.0, **options))
