"""The trials of stage 2's optimisers at tiny size: what each trains, and that dense attention is dense."""

import argparse
import json

import pytest

pytest.importorskip("accelerate")

from benchmarks import stage2_optimisers
from benchmarks.stage2_optimisers import Trial


def test_trials_train_what_they_say(tmp_path, capsys):
    out = tmp_path / "trials.json"
    options = ["--tiny", "--device", "cpu", "--seconds", "0.2", "--out", str(out), "--trials"]
    stage2_optimisers.main([*options, "lora4:muon:2e-3", "full:adamw:3e-4:distill"])
    # a second call keeps the first one's rows
    stage2_optimisers.main([*options, "lora4:adamw:0:dense"])
    lora, full, dense = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert min(row["steps"] for row in (lora, full, dense)) >= stage2_optimisers.UNTIMED
    assert lora["flow"] != full["flow"] and 0 < lora["distance"] < 1 and 0 < full["distance"] < 1
    # nothing learned, dense attention: the dense model itself
    assert dense["flow"] == pytest.approx(dense["dense_flow"], rel=1e-5) and dense["distance"] < 1e-9
    assert "| lora4:muon:2e-3 |" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["lora:muon:1e-3", "half:muon:1e-3", "full:lion:1e-3", "full:muon:1e-3:slow"])
def test_a_trial_that_is_none_is_told(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not lora64"):
        Trial.parse(text)
