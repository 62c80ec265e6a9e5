"""What the training node is made of, without ComfyUI: the schedule, its settings, the plot."""

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

PACK = Path(__file__).resolve().parents[2]


def pack_module(name):
    """A module of the pack's nodes/, imported through the pack's package as ComfyUI does."""
    if "sla2_pack" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "sla2_pack", PACK / "__init__.py", submodule_search_locations=[str(PACK)]
        )
        sys.modules["sla2_pack"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["sla2_pack"])
    return importlib.import_module(f"sla2_pack.nodes.{name}")


@pytest.mark.parametrize("sampling_steps", [1, 4, 8, 20, 50])
@pytest.mark.parametrize("budget", [1, 3, 40, 120, 1001])
def test_schedule_spends_the_budget_evenly_over_all_timesteps(sampling_steps, budget):
    schedule = pack_module("training.router_training").Schedule(budget, sampling_steps)
    done, per_step = 0, []
    for number in range(schedule.passes):
        for step in range(sampling_steps):
            per_step.append(schedule.due(done, number, step))
            done += per_step[-1]
    assert done == budget
    assert max(per_step) <= 4 and max(per_step) - min(per_step) <= 1
    # a call beyond the announced steps (a sampler that takes more) owes nothing
    assert schedule.due(done, schedule.passes - 1, sampling_steps + 3) == 0


def test_a_missed_step_is_made_up_for():
    schedule = pack_module("training.router_training").Schedule(40, 20)
    assert schedule.due(0, 0, 0) == 2
    assert schedule.due(0, 0, 4) == 10


def test_sparsities():
    parse = pack_module("training.router_training").parse_sparsities
    assert parse("0.97, 0.95,0.90") == (0.97, 0.95, 0.9)
    assert parse("0.5") == (0.5,)
    for text in ("", "97", "0.9, 0.9", "0.9 0.8", "nan", "0", "1"):
        with pytest.raises(ValueError, match="sparsities must be different numbers between 0 and 1"):
            parse(text)


@pytest.mark.parametrize(
    "losses",
    [{}, {0: [0.3]}, {0: [0.3, 0.2, 0.0], 7: [0.01]}, {i: [1 / (i + j + 1) for j in range(50)] for i in range(40)}],
)
def test_plot_is_an_image_with_its_curves(losses):
    plot = pack_module("training.loss_plot").plot_losses
    image = plot(losses)
    assert image.shape == (1, 400, 720, 3) and 0 <= image.min() and image.max() <= 1
    if losses:
        assert (image != plot({})).any()
