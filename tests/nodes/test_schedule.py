"""Schedules: how they read, which sparsity a call gets, and what the hook does with it."""

import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
HEADS, DIM = 2, 64


@pytest.fixture
def parse(pack_module):
    schedule, settings = pack_module("nodes.schedule"), pack_module("nodes.settings")
    return lambda text, layers=30: schedule.parse_schedule(text, layers, settings.parse_layers)


@pytest.fixture
def sparsity_of(pack_module):
    return pack_module("nodes.schedule").sparsity_of


TEXT = "0%-20%: dense; 20%-100%: 0.8 -> 0.97\nlayers 0-3, 29: 0.85; 50%-100%, layers 4: 0.5"


@pytest.mark.parametrize(
    ("layer", "progress", "expected"),
    [
        (10, 0.0, None),
        (10, 0.1, None),
        (10, 0.2, 0.8),
        (10, 0.5, 0.86),
        (10, 1.0, 0.97),
        (2, 0.0, 0.85),
        (29, 0.5, 0.85),
        (4, 0.4, 0.84),
        (4, 0.5, 0.5),
    ],
)
def test_the_last_rule_that_covers_a_call_counts(parse, sparsity_of, layer, progress, expected):
    assert sparsity_of(parse(TEXT), layer, progress, 0.9) == pytest.approx(expected)


def test_without_a_rule_or_without_a_step_the_setting_counts(parse, sparsity_of):
    assert sparsity_of((), 3, 0.5, 0.9) == 0.9
    assert sparsity_of(parse("0%-50%: dense"), 3, 0.7, 0.9) == 0.9
    assert sparsity_of(parse("0%-50%: dense"), 3, None, 0.9) == 0.9
    assert parse(" ; \n") == ()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("0.9", "has no colon"),
        ("first half: 0.9", "'first half' is no range of steps or layers"),
        (": 0.9", "is no range of steps or layers"),
        ("50%-20%: 0.9", "must rise and lie between 0% and 100%"),
        ("0%-120%: 0.9", "must rise and lie between 0% and 100%"),
        ("0%-50%: 1.0", "at least 0 and below 1, got '1.0'"),
        ("0%-50%: much", "got 'much'"),
        ("layers 3-99: 0.5", "dense_layers names layer 99"),
    ],
)
def test_nonsense_is_refused_in_one_sentence(parse, text, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse(text)


def test_progress_is_the_inverse_of_percent_to_sigma(pack_module):
    shift = 5.0

    def percent_to_sigma(percent):
        t = 1 - percent
        return shift * t / (1 + (shift - 1) * t)

    progress = pack_module("nodes.schedule").RunProgress(percent_to_sigma)
    for percent in (0.0, 0.013, 0.25, 0.5, 0.77, 1.0):
        assert progress.at(percent_to_sigma(percent)) == pytest.approx(percent, abs=2e-3)
    assert progress.at(2.0) == 0.0 and progress.at(-1.0) == 1.0


def test_the_hook_follows_the_schedule(bench, parse):
    generator = torch.Generator().manual_seed(0)
    qkv = [torch.randn(1, 640, HEADS * DIM, generator=generator) for _ in range(3)]
    b = bench(grid=(10, 8, 8), schedule=parse("0%-20%: dense; 20%-100%: 0.5 -> 0.9; layers 1: 0.8", 4), sparsity=0.3)
    b.hook.begin_run()
    for sigma in (1.0, 0.75, 0.0):
        b.model_call(sigma)
        for layer in (0, 1):
            b.attend(*qkv, heads=HEADS, layer=layer)
    run = b.run
    b.hook.end_run()
    assert run.layers[0].dense == {"the schedule keeps this step or layer dense": 1}
    assert run.layers[0].sparse == 2
    # 10 whole key blocks: at 25% of the run 0.53, 4 kept; at its end 0.9, 1 kept
    assert run.layers[0].sparsity == pytest.approx(1 - (4 + 1) / 20)
    assert run.layers[1].sparse == 3 and run.layers[1].sparsity == pytest.approx(0.8)


def test_a_schedule_without_steps_never_reads_the_device(bench, parse):
    b = bench(schedule=parse("layers 0: 0.4", 4))
    b.hook.begin_run()
    b.options = {"sigmas": object(), "optimized_attention_override": b.override}
    b.hook.model_call(b, dict, b.options)


def test_presets_say_what_their_benchmark_wrote_down(pack_module):
    rows = json.loads((ROOT / "benchmarks/results/presets-nvidia-h100-80gb-hbm3.json").read_text())["rows"]
    expected = {row["name"]: f"SSIM {row['ssim']:.2f}, PSNR {row['psnr']:.1f} dB" for row in rows}
    presets = pack_module("nodes.presets").PRESETS
    assert {preset.name: preset.measured for preset in presets} == expected
    # of the presets as they are: another sparsity or schedule is to be measured again
    settings = {row["name"]: (row["sparsity"], row["schedule"], row["trained"]) for row in rows}
    assert {preset.name: (preset.sparsity, preset.schedule, preset.trained) for preset in presets} == settings


def test_presets_are_all_readable_and_say_what_they_rest_on(pack_module, parse):
    presets = pack_module("nodes.presets")
    assert presets.preset_named("custom") is None
    for preset in presets.PRESETS:
        assert presets.preset_named(preset.name) is preset
        parse(preset.schedule)
        notes = presets.preset_notes(preset, None)
        assert any("not been measured" in note for note in notes) == (preset.measured is None)
        assert any(f"({preset.measured} beside a dense run" in note for note in notes) == (preset.measured is not None)
        assert any("trained router" in note for note in notes) == preset.trained
        assert not any("trained router" in note for note in presets.preset_notes(preset, object()))
    with pytest.raises(ValueError, match="preset must be one of custom, quality"):
        presets.preset_named("best")
