"""The study of the untrained mode's error: it runs, and compares at equal time as it says."""

import json

import pytest
import torch

from benchmarks import untrained_error
from benchmarks.untrained_error import Tap, at_equal_time, rms


def test_a_tiny_study_writes_what_it_measured(tmp_path):
    untrained_error.main(["--tiny", "--device", "cpu", "--out", str(tmp_path / "found.json")])
    errors = json.loads((tmp_path / "found.json").read_text())["errors"]["320"]
    assert set(errors) == {"fitted 0.5", "estimated 0.5"}
    assert all(0 < error < 1 for late_and_all in errors.values() for error in late_and_all)


def test_the_error_is_that_of_the_method_in_the_chosen_steps():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 96, 2, 32) for _ in range(3))
    exact = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    tap = Tap({"a tenth too large": lambda q, k, v, number: 1.1 * exact}, (1,), 96, torch.float32)
    for _ in range(6):
        torch.testing.assert_close(tap(0, q, k, v), exact)
    assert rms([tap], "a tenth too large", (1,)) == pytest.approx(0.1, rel=1e-4)
    assert {step for _, step in tap.squares} == {1}


def test_equal_time_lies_between_measured_sparsities():
    errors = {"fitted 0.99": 0.4, "fitted 0.96": 0.1, "sol_attn a": 0.3, "sol_attn b": 0.3}
    times = {"fitted 0.99": 2.0, "fitted 0.96": 4.0, "sol_attn a": 3.0, "sol_attn b": 9.0}
    (_, ms, error, sparsity, ours), outside = at_equal_time(errors, times)
    # halfway in time: the geometric means of the kept shares and of the errors
    assert (ms, error) == (3.0, 0.3)
    assert sparsity == pytest.approx(0.98)
    assert ours == pytest.approx(0.2)
    assert outside[3:] == (None, None)
