"""The training code at tiny size: what a VAE's training writes, that it repeats, and the parts of the transformer's."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from miniature import picture, report, train_dit, train_vae
from miniature.lora import add_lora, lora_of, save_lora
from miniature.optim import Budget, Muon, orthogonalise
from miniature.sample import load_models, main
from miniature.vae import WanVAE
from sla2_kernels.weights import RouterLayer, RouterWeights


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Call: trains a VAE for three steps; returns its folder."""

    def run():
        out = tmp_path_factory.mktemp("vae")
        train_vae.main(["--out", str(out), "--tiny", "--steps", "3", "--dim", "8", "--device", "cpu", "--no-compile",
                        "--print-seconds", "0"])  # fmt: skip
        return out

    return run


def test_a_vae_training_writes_normalised_weights_and_repeats(train):
    one, two = train(), train()
    assert {path.name for path in one.iterdir()} == {train_vae.VAE_FILE, "vae_log.json", "vae_sheet.png"}
    log = json.loads((one / "vae_log.json").read_text())
    assert [record["step"] for record in log["records"]] == [1, 2, 3]
    assert log["results"]["normalised_latent_std"] == pytest.approx([1.0] * 16, abs=0.3)
    weights, again = (load_file(folder / train_vae.VAE_FILE) for folder in (one, two))
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert all(torch.equal(weights[key], again[key]) for key in weights)
    assert WanVAE.from_state_dict(weights).dim == 8


def test_sampling_from_files_writes_pictures(tiny_weights, tmp_path):
    pytest.importorskip("PIL")
    main(["--weights", str(tiny_weights), "--out", str(tmp_path), "--caption", "two red balls bounce over tiles",
          "--frames", "5", "--height", "32", "--width", "32", "--steps", "2", "--device", "cpu"])  # fmt: skip
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "sample_0.webp").read_bytes()[8:12] == b"WEBP"


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
    weights, measured, readme = tmp_path / "weights", tmp_path / "measured", tmp_path / "README.md"
    shutil.copytree(tiny_weights, weights)
    results = {"steps": 1234, "seconds": 90.0, "validation_loss_full": 0.0805, "validation_loss_small": 0.188}
    log = {"run": {"sitting": 3, "device_name": "a card"}, "results": results}
    (weights / "long_log.json").write_text(json.dumps(log))
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.main(["--weights", str(weights), "--readme", str(readme)])
    text = readme.read_text()
    assert "| Last sitting (3) | 1234 steps, 1.5 minutes on a card |" in text
    assert "| Validation loss, held-out captions, 832x480 | 0.0805 |" in text
    assert " 2 layers, bfloat16 |" in text and "base width 8, float16" in text and "pass" not in text
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    row = dict.fromkeys(("count", "colour", "shape", "size", "steady", "frames_passed"), 0.9)
    found = {"passed": 23, "of": 24, "size": [81, 480, 832], "steps": 20, "cfg": 3.0, "shift": 12.0}
    measured.mkdir()
    (measured / "measure.json").write_text(json.dumps(found | {"rows": [row, row | {"shape": 0.8}]}))
    report.main(["--weights", str(weights), "--readme", str(readme), "--measured", str(measured)])
    text = readme.read_text()
    assert "(81 frames of 832x480, 20 steps, guidance 3, shift 12) | 23 of 24 |" in text
    assert "shape 0.85" in text and (weights / "measure.json").exists()
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="exactly one"):
        report.fill(readme, weights)


def test_the_pictures_show_each_caption_dense_and_sparse(tiny_weights, tmp_path):
    Image = pytest.importorskip("PIL.Image")
    model = add_lora(load_models(tiny_weights)[0], 2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_(std=0.1)
    lora, router = tmp_path / "lora.safetensors", tmp_path / "router.safetensors"
    save_lora(lora, lora_of(model.state_dict()), torch.float32, "random")
    layer = RouterLayer(torch.eye(128), torch.eye(128), torch.zeros(1, 2, 1))
    RouterWeights((layer, layer), "wan", 2, 128, sparsities=(0.5,)).save(router)

    def pictures(*options):
        picture.main(["--out", str(tmp_path), "--weights", str(tiny_weights), "--frames", "9", "--height", "64", "--width", "96", "--steps",
                      "1", "--sparsity", "0.5", "--device", "cpu", "--samples", "1", *options])  # fmt: skip
        return json.loads((tmp_path / "picture.json").read_text())["rows"]

    rows = pictures("--router", str(router), "--lora", str(lora), "--lora-router", str(router))
    assert [row["way"] for row in rows] == ["dense", "untrained", "router", "LoRA and router"]
    errors = [row["latent_error"] for row in rows]
    assert errors[0] == 0 < min(errors[1:]) and errors[3] != errors[2]
    for name, frames, count in (("picture.jpg", 6, 4), ("samples.jpg", 8, 1)):
        with Image.open(tmp_path / name) as picture_:
            assert picture_.size == (frames * (96 // 4 + 4), count * (64 // 4 + 4))
    # a LoRA of few steps is in every row, the dense one too
    merged = pictures("--router", str(router), "--lora", "none", "--few-lora", str(lora))
    assert [row["way"] for row in merged] == ["dense", "untrained", "router"]
    assert merged[2]["latent_error"] not in (0, errors[2])
