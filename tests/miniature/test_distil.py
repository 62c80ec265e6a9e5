"""Distilling: what is learned, from which noisy videos, what a run writes and where the next goes on; the LoRA's file."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from miniature import distil, lora, measure, sample, wan
from miniature.train_dit import DIT_FILE

RUN = ["--tiny", "--minutes", "0", "--device", "cpu", "--no-compile", "--print-seconds", "0", "--test-clips", "3",
       "--teacher-steps", "8", "--rank", "16", "--lr", "1e-2", "--mix", "small=1"]  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """File of a small random transformer that heeds its caption, so that guidance matters."""
    torch.manual_seed(0)
    model = wan.WanModel(wan.WanConfig(dim=128, ffn_dim=128, num_layers=2))
    with torch.no_grad():
        for block in model.blocks:
            block.cross_attn.o.weight.mul_(8)
    path = tmp_path_factory.mktemp("random") / "model.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def first(weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("distilled")
    distil.main(["--out", str(out), "--from", str(weights), "--steps", "60", *RUN])
    return out


def log_of(folder, number=1):
    return json.loads((folder / distil.LOG_FILE.format(number)).read_text())


def test_the_loss_falls_and_the_student_comes_nearer_to_the_guided_teacher(first):
    log = log_of(first)
    trained = [record["loss_small"] for record in log["records"] if record["stage"] == "train"]
    assert sum(trained[-2:]) / 2 < 0.7 * trained[0]
    tested = [record["small_4"] for record in log["records"] if record["stage"] == "test"]
    assert tested[-1] < 0.7 * log["results"]["error_teacher"]["small_4"]
    assert log["results"]["steps"] == 60
    assert {path.name for path in first.iterdir()} == {
        "wan_miniature_4_steps_lora.safetensors",
        distil.LIVE_FILE,
        distil.LOG_FILE.format(1),
    }


def test_resuming_goes_on_from_the_live_lora_also_for_other_steps(first, weights):
    before = load_file(first / distil.LIVE_FILE)
    distil.main(
        ["--out", str(first), "--from", str(weights), "--steps", "1", "--resume", *RUN, "--student-steps", "4,8"]
    )
    after = load_file(first / distil.LIVE_FILE)
    changes = [(after[key] - value).abs().max().item() for key, value in before.items()]
    assert 0 < max(changes) < 1e-3  # one step of the warm-up
    assert log_of(first, 2)["run"]["number"] == 2
    assert (first / "wan_miniature_4_8_steps_lora.safetensors").exists()


@pytest.mark.parametrize("own", [False, True])
def test_a_segment_is_the_teachers_mean_velocity_from_where_the_steps_have_led(own):
    def teacher(x, level):
        return x * level

    def student(x, level):
        return torch.ones_like(x)

    levels = distil.segment_levels(4, 6, 3.0)
    assert [len(part) for part in levels] == [3] * 4
    assert sum((part[:-1] for part in levels), []) == sample.noise_schedule(8, 3.0).tolist()[:-1]
    assert [part[0] for part in levels] == pytest.approx(sample.noise_schedule(4, 3.0).tolist()[:-1])
    noise = torch.randn(2, 16, 1, 2, 2)
    made = distil.segments(teacher, student if own else None, noise, levels)
    x = noise
    for (start, level, velocity), part in zip(made, levels, strict=True):
        span = part[-1] - part[0]
        torch.testing.assert_close(start, x)
        assert level == part[0]
        torch.testing.assert_close(start + span * velocity, distil.euler(teacher, start, part))
        x = x + span * (torch.ones_like(x) if own else velocity)
    if not own:
        torch.testing.assert_close(x, distil.euler(teacher, noise, sample.noise_schedule(8, 3.0).tolist()))


def test_segments_are_drawn_from_the_last_rounds():
    replay, generator = distil.Replay(2), torch.Generator().manual_seed(0)
    for n in range(3):
        made = [(torch.full((2, 16, 1, 2, 2), 10.0 * n + i), 0.1 * i, torch.zeros(2, 16, 1, 2, 2)) for i in range(4)]
        replay.add(made, torch.tensor([n, n + 100]))
    x, level, _, caption = replay.draw(100, generator)
    assert len(x) == 16
    assert set(caption.tolist()) == {1, 2, 101, 102}
    torch.testing.assert_close(x[:, 0, 0, 0, 0].float() % 10, 10 * level)
    assert torch.equal(x[:, 0, 0, 0, 0].float() // 10, (caption % 100).float())


@torch.no_grad()
def test_guidance_in_one_call_is_that_of_sampling(weights):
    model = wan.WanModel(wan.WanConfig(dim=128, ffn_dim=128, num_layers=2)).eval()
    model.load_state_dict(load_file(weights))
    context, shape = sample.embed("two red balls bounce"), (1, 16, 2, 4, 6)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    calls = []
    model.head.register_forward_hook(lambda *_: calls.append(1))
    for guidance, each in ((3.0, 2), (1.0, 1)):
        calls.clear()
        expected = sample.sample_latents(model, context, shape=shape, seed=3, steps=4, cfg=guidance)
        assert len(calls) == 4 * each
        found = distil.euler(distil.velocity_of(model, context, guidance), noise, sample.noise_schedule(4).tolist())
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_merged_weights_compute_what_the_factors_do(weights, tmp_path):
    state = load_file(weights)
    plain, factors = (wan.WanModel(wan.WanConfig.from_state_dict(state)).eval() for _ in range(2))
    factors.load_state_dict(state)
    lora.add_lora(factors, 4)
    for name, parameter in factors.named_parameters():
        assert parameter.requires_grad == (".lora_" in name)
        if name.endswith("lora_up"):
            parameter.normal_(std=0.1)
    lora.save_lora(tmp_path / "lora.safetensors", lora.lora_of(factors.state_dict()), torch.float32, "a test")
    loaded = lora.load_lora(tmp_path / "lora.safetensors")
    plain.load_state_dict(lora.merge_lora(state, loaded))
    x, t, context = torch.randn(1, 16, 2, 4, 6), torch.tensor([500.0]), sample.embed("two red balls")
    out = plain(x, t, context)
    torch.testing.assert_close(out, factors(x, t, context), atol=1e-4, rtol=1e-4)
    plain.load_state_dict(state)
    assert (out - plain(x, t, context)).abs().max() > 0.01

    again = lora.add_lora(plain, 4, seed=1)
    lora.set_lora(again, loaded)
    torch.testing.assert_close(again(x, t, context), out, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="the rank that it was trained with"):
        lora.set_lora(lora.add_lora(wan.WanModel(wan.WanConfig.from_state_dict(state)), 2), loaded)
    with pytest.raises(ValueError, match="which these weights do not have"):
        lora.merge_lora({key: value for key, value in state.items() if "blocks.1" not in key}, loaded)
    with pytest.raises(ValueError, match="is not a LoRA"):
        lora.load_lora(weights)


def test_the_measure_samples_with_the_lora(tiny_weights, tmp_path):
    model, _ = sample.load_models(tiny_weights)
    state = lora.add_lora(model, 4).state_dict()
    with torch.no_grad():
        [value.fill_(0.5) for key, value in state.items() if key.endswith("lora_up")]
    lora.save_lora(tmp_path / "lora.safetensors", lora.lora_of(state), torch.bfloat16, "a test")
    options = ["--weights", str(tiny_weights), "--steps", "1", "--cfg", "1", "--captions", "1", "--frames", "1",
               "--height", "160", "--width", "160", "--loss-clips", "1", "--device", "cpu"]  # fmt: skip
    losses = []
    for extra in ([], ["--lora", str(tmp_path / "lora.safetensors")]):
        measure.main(["--out", str(tmp_path), *options, *extra])
        report = json.loads((tmp_path / "measure.json").read_text())
        losses.append(report["validation_loss"])
    assert (report["lora"], report["steps"], report["cfg"]) == ("lora.safetensors", 1, 1.0)
    assert losses[0] != losses[1]
    words = [
        "--weights",
        str(tiny_weights),
        "--lora",
        str(tmp_path / "lora.safetensors"),
        "--out",
        str(tmp_path / "merged"),
    ]
    lora.main(words)
    merged, _ = sample.load_models(tmp_path / "merged")
    wanted, _ = sample.load_models(tiny_weights, lora=tmp_path / "lora.safetensors")
    for ours, theirs in zip(merged.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.bfloat16().float())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--student-steps", "four"], "four"),
        (["--student-steps", "0"], "from 1 on"),
        (["--mix", "huge=1"], "mix 'huge=1'"),
        (["--resume"], "no live_lora.safetensors"),
    ],
)
def test_bad_options_are_named(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        distil.main(["--out", str(tmp_path), "--minutes", "1", *options])
    assert message in capsys.readouterr().err


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no transformer at .*{DIT_FILE}"):
        distil.load_weights(tmp_path)
    with pytest.raises(FileNotFoundError, match="no LoRA at"):
        lora.load_lora(tmp_path / "none.safetensors")
