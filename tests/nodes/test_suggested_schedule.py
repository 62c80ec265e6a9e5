"""Which schedule a training suggests from the errors it measured."""

import pytest

from sla2_training.report import VARIANTS, LayerErrors, TrainingReport


def report(errors, sparsities):
    """errors: {layer: relative error after training at each of the sparsities}; before it, all are 1."""
    measured = {}
    for layer, values in errors.items():
        squared = {variant: (1.0,) * len(values) for variant in VARIANTS}
        squared[VARIANTS[-1]] = tuple(value**2 for value in values)
        measured[layer] = LayerErrors(sparsities, squared, 1.0)
    return TrainingReport(sparsities, measured, {}, ())


@pytest.fixture
def suggest(pack_module):
    return pack_module("nodes.training.suggested_schedule").suggested_schedule


def test_a_layer_gets_the_highest_sparsity_within_the_tolerance(suggest):
    # the median at 0.95 is 0.2: layers 0 and 1 are within it at 0.97, layer 2 at 0.95, layers 3 and 4 nowhere
    errors = {
        0: (0.2, 0.1, 0.05),
        1: (0.15, 0.1, 0.05),
        2: (0.3, 0.2, 0.1),
        3: (0.5, 0.4, 0.3),
        4: (0.5, 0.4, 0.15),
    }
    text = suggest(report(errors, (0.97, 0.95, 0.90)))
    assert text == "layers 3-4: 0.9; layers 2: 0.95; layers 0-1: 0.97"


def test_it_can_be_read_back_and_names_every_measured_layer_once(suggest, pack_module):
    errors = {layer: (0.01 * (layer * 7 % 11), 0.02 * (layer * 7 % 11)) for layer in (0, 1, 2, 3, 5, 8, 9)}
    text = suggest(report(errors, (0.9, 0.97)))
    rules = pack_module("nodes.settings.schedule").parse_schedule(
        text, 10, pack_module("nodes.settings.values").parse_layers
    )
    assert sorted(layer for rule in rules for layer in rule.layers) == [0, 1, 2, 3, 5, 8, 9]
    assert {rule.sparsity for rule in rules} == {(0.9, 0.9), (0.97, 0.97)}


def test_one_trained_sparsity_goes_to_every_layer(suggest):
    assert suggest(report({0: (0.1,), 1: (0.9,)}, (0.00001,))) == "layers 0-1: 0.00001"


def test_nothing_measured_is_nothing_suggested(suggest):
    assert suggest(report({}, (0.97,))) == ""
