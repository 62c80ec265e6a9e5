"""Schedules: how they read, which sparsity a call gets, and what the hook does with it."""

import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
HEADS, DIM = 2, 64


@pytest.fixture
def parse(pack_module):
    schedule, settings = pack_module("nodes.settings.schedule"), pack_module("nodes.settings.values")
    return lambda text, layers=30: schedule.parse_schedule(text, layers, settings.parse_layers)


@pytest.fixture
def sparsity_of(pack_module):
    return pack_module("nodes.settings.schedule").sparsity_of


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
        ("layers 3-99: 0.5", "^schedule names layer 99, but this model has layers 0 to 29"),
        ("layers 3-x: 0.5", "^schedule must name layers like .* but '3-x' is no layer"),
        ("layers 3-1: 0.5", "^schedule holds the range '3-1', which ends before it starts"),
        ("step 0: dense", "'step 0': they count from 1 and must rise"),
        ("steps 3-2: dense", "'steps 3-2': they count from 1 and must rise"),
        ("0%-20%, step 1: dense", "is no range of steps or layers"),
        ("steps: dense", "is no range of steps or layers"),
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

    progress = pack_module("nodes.settings.schedule").RunProgress(percent_to_sigma)
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


NOISE, NONE = torch.ones(1, 4), torch.zeros(1, 4)


def flow_sigmas(steps, shift):
    t = torch.linspace(1, 0, steps + 1)
    return shift * t / (1 + (shift - 1) * t)


def dense_steps(b, sigmas, noise=NOISE):
    """Numbers of the steps that ran dense in one sampling with these sigmas, and the closed run."""
    qkv = [torch.ones(1, 128, HEADS * DIM) for _ in range(3)]
    b.hook.begin_run(None, lambda: {"noise": noise, "sigmas": sigmas})
    dense = []
    for number, sigma in enumerate(sigmas[:-1].tolist(), 1):
        before = b.run.layers[0].dense.total()
        b.model_call(sigma, sample_sigmas=sigmas)
        b.attend(*qkv, heads=HEADS)
        dense += [number] * (b.run.layers[0].dense.total() - before)
    b.hook.end_run()
    return dense, b.hook.runs.finished()[-1]


@pytest.fixture
def of_preset(bench, parse, pack_module):
    preset = pack_module("nodes.settings.presets").preset_named("balanced, 4-8 steps")
    return bench(grid=(2, 8, 8), schedule=parse(preset.schedule, 4), sparsity=preset.sparsity)


@pytest.mark.parametrize("shift", [1.0, 5.0, 12.0])
@pytest.mark.parametrize("steps", [4, 5, 6, 8])
def test_a_preset_of_few_steps_keeps_one_step_dense(of_preset, steps, shift):
    assert dense_steps(of_preset, flow_sigmas(steps, shift))[0] == [1]


def test_it_is_the_first_step_whatever_the_schedulers_spacing(of_preset):
    near = torch.tensor([1.0, 0.995, 0.99, 0.98, 0.0])
    low = torch.tensor([0.6, 0.4, 0.2, 0.0])
    assert dense_steps(of_preset, near)[0] == dense_steps(of_preset, low)[0] == [1]
    assert dense_steps(of_preset, near, noise=NONE)[0] == [1], "with noise that another node added"


def test_steps_split_over_two_samplers_have_one_first_step(of_preset):
    """As Wan 2.2's 2 + 2: the second sampler adds no noise and begins where the first one ended."""
    sigmas = flow_sigmas(4, 5.0)
    first, run = dense_steps(of_preset, sigmas[:3])
    assert first == [1] and run.notes == {}
    second, run = dense_steps(of_preset, sigmas[2:], noise=NONE)
    assert second == [] and "goes on with what another one began" in next(iter(run.notes))


def test_steps_by_number_are_counted_by_the_samplers_own_sigmas(pack_module):
    steps = pack_module("nodes.settings.schedule").StepNumbers()
    sigmas = torch.tensor([1.0, 0.7, 0.3, 0.0])
    # the model is asked between two steps too, by samplers of second order; a little noise may be put on top of the first
    found = [steps.at(sigma, sigmas) for sigma in (1.01, 1.0, 0.8, 0.7, 0.3, 0.2, 0.0)]
    assert found == [1, 1, 1, 2, 3, 3, 3]
    assert [steps.at(sigma, sigmas.flip(0)) for sigma in (0.0, 0.3, 0.7)] == [1, 2, 3]
    assert steps.at(0.7, None) is None


def test_rules_by_number_and_their_ramps(parse, sparsity_of):
    rules = parse("steps 2-4: 0.8 -> 0.9; step 1, layers 0-1: dense")
    assert [sparsity_of(rules, 0, 0.5, 0.5, step) for step in (1, 2, 3, 4, 5, None)] == [None, 0.8, 0.85, 0.9, 0.5, 0.5]
    assert sparsity_of(rules, 2, 0.5, 0.5, 1) == 0.5
    assert sparsity_of(parse("step 3: 0.8 -> 0.9"), 0, None, 0.5, 3) == 0.8


def test_a_sampler_that_names_no_steps_is_said(bench, parse):
    b = bench(schedule=parse("step 1: dense", 4))
    b.hook.begin_run(None, lambda: {"args": (NONE,)})  # of a guider with arguments of its own
    b.model_call()
    assert "does not say which step this is" in next(iter(b.run.notes))


def test_presets_say_what_their_benchmark_wrote_down(pack_module):
    rows = json.loads((ROOT / "benchmarks/results/presets-nvidia-h200.json").read_text())["rows"]
    for preset in pack_module("nodes.settings.presets").PRESETS:
        settings = preset.sparsity, preset.schedule, preset.trained, preset.target_error
        measured = [row for row in rows if row["name"] == preset.name]
        # of the presets as they are: another sparsity or schedule is to be measured again
        same = [(row["sparsity"], row["schedule"], row["trained"], row["target_error"]) == settings for row in measured]
        assert preset.measured == ("; ".join(map(_measured, measured)) if all(same) else None), preset.name


def _measured(row):
    right = f"{row['passed']} of 6 videos right"
    return f"{row['steps']} steps: {right}, SSIM {row['ssim']:.2f}, PSNR {row['psnr']:.1f} dB"


def test_presets_are_all_readable_and_say_what_they_rest_on(pack_module, parse):
    presets = pack_module("nodes.settings.presets")
    assert presets.preset_named("custom") is None
    for preset in presets.PRESETS:
        assert presets.preset_named(preset.name) is preset
        parse(preset.schedule)
        notes = presets.preset_notes(preset, None)
        assert any("not been measured" in note for note in notes) == (preset.measured is None)
        assert any(f"({preset.measured})" in note for note in notes) == (preset.measured is not None)
        assert any("trained router" in note for note in notes) == preset.trained
        assert not any("trained router" in note for note in presets.preset_notes(preset, object()))
    with pytest.raises(ValueError, match="preset must be one of automatic, custom, quality"):
        presets.preset_named("best")


def test_the_preset_with_a_target_error_needs_calls_that_measure(pack_module):
    presets, values = pack_module("nodes.settings.presets"), pack_module("nodes.settings.values")
    measures = '^the preset "constant quality" needs calls that measure their error: set .* or choose another preset.$'
    for method in values.METHODS:
        for mode in (None, *values.RATIO_MODES):
            if method == "top-k only" or mode in ("estimated", "fixed"):
                with pytest.raises(ValueError, match=measures):
                    presets.check_preset("constant quality", method, mode)
            else:
                presets.check_preset("constant quality", method, mode)
    with pytest.raises(ValueError, match="choose another, or take sla_weights out.$"):
        presets.check_preset("constant quality", "automatic", "learned", has_sla=True)
    presets.check_preset("balanced", "automatic", "fixed", has_sla=True)
