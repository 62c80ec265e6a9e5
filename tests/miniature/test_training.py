"""The training code at tiny size: what it writes, that it repeats, and that it learns."""

import json

import pytest
import torch
from safetensors.torch import load_file

from miniature import report, train_dit
from miniature.optim import Budget, Muon, orthogonalise
from miniature.sample import load_models, main
from miniature.train_vae import VAE_FILE

FILES = {train_dit.DIT_FILE, VAE_FILE, "vae_log.json", "dit_log.json",
         "vae_sheet.png", "samples_full.png", "samples_small.png"}  # fmt: skip


def test_a_run_writes_whole_files_and_nothing_else(tiny_weights):
    assert {path.name for path in tiny_weights.iterdir()} == FILES
    log = json.loads((tiny_weights / "dit_log.json").read_text())
    assert log["results"]["dit_steps"] == 3
    assert 0 < log["results"]["validation_loss_full"] < 4
    assert [record["step"] for record in log["records"] if record["stage"] == "dit"] == [1, 2, 3]
    dtypes = {tensor.dtype for tensor in load_file(tiny_weights / train_dit.DIT_FILE).values()}
    assert dtypes == {torch.bfloat16}


def test_the_same_seed_gives_the_same_weights(tiny_weights, train_tiny, tmp_path):
    train_tiny(tmp_path)
    for name in (train_dit.DIT_FILE, VAE_FILE):
        one, two = load_file(tiny_weights / name), load_file(tmp_path / name)
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_saved_latents_are_normalised(tiny_weights):
    results = json.loads((tiny_weights / "vae_log.json").read_text())["results"]
    assert results["normalised_latent_std"] == pytest.approx([1.0] * 16, abs=0.3)


def test_sampling_from_files_writes_pictures(tiny_weights, tmp_path):
    pytest.importorskip("PIL")
    main(["--weights", str(tiny_weights), "--out", str(tmp_path), "--caption", "two red balls bounce over tiles",
          "--frames", "5", "--height", "32", "--width", "32", "--steps", "2", "--device", "cpu"])  # fmt: skip
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "sample_0.webp").read_bytes()[8:12] == b"WEBP"


def test_missing_vae_is_named(tmp_path):
    from miniature import train

    with pytest.raises(SystemExit, match="no VAE at"):
        train.main(["dit", "--out", str(tmp_path), "--tiny", "--device", "cpu", "--no-compile"])


def test_models_load_from_a_folder(tiny_weights):
    model, vae = load_models(tiny_weights)
    assert (model.config.num_layers, vae.dim) == (2, 8)


def test_orthogonalise_flattens_the_singular_values():
    torch.manual_seed(0)
    for shape in ((2, 24, 64), (2, 64, 24)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert values.min() > 0.4
        assert values.max() < 1.4


def test_muon_lowers_a_least_squares_loss():
    torch.manual_seed(0)
    target, weight = torch.randn(16, 32), torch.nn.Parameter(torch.zeros(16, 32))
    optimiser = Muon([weight], lr=0.1, weight_decay=0.0)
    losses = []
    for _ in range(150):
        loss = (weight - target).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < 0.2 * losses[0]


def test_budget_by_steps_ignores_the_clock():
    budget = Budget(0.0, steps=4)
    assert [budget.progress(step) for step in range(5)] == [0, 0.25, 0.5, 0.75, 1.0]


def test_noise_levels_cover_the_range_and_lean_to_noise():
    levels = train_dit.noise_levels(1000, 5.0, torch.Generator().manual_seed(0))
    assert 0 < levels.min() < 0.01
    assert 0.999 < levels.max() < 1
    assert levels.median() == pytest.approx(5 / 6, abs=0.01)


def test_report_fills_the_readme_from_the_logs(tiny_weights, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.main(["--weights", str(tiny_weights), "--readme", str(readme)])
    text = readme.read_text()
    loss = json.loads((tiny_weights / "dit_log.json").read_text())["results"]["validation_loss_full"]
    assert f"| Validation loss, held-out captions | {loss:.4f} |" in text
    assert "1. two red balls bounce over tiles, camera pans right" in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="exactly one"):
        report.fill(readme, tiny_weights)


def test_training_continues_from_a_file(tiny_weights, train_tiny, tmp_path):
    start = ["--vae", str(tiny_weights / VAE_FILE), "--dit-start", str(tiny_weights / train_dit.DIT_FILE)]
    train_tiny(tmp_path, *start, stage="dit")
    one, two = load_file(tiny_weights / train_dit.DIT_FILE), load_file(tmp_path / train_dit.DIT_FILE)
    key = "blocks.0.ffn.0.weight"
    assert not torch.equal(one[key], two[key])
    # Three steps of warm-up move the weights little: a fresh start would be far from it.
    torch.testing.assert_close(one[key].float(), two[key].float(), atol=0.01, rtol=0)
