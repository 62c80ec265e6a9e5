"""benchmarks.backward as far as it goes without a GPU: arguments, and what a run in another card's instructions leaves."""

import json
from dataclasses import replace

import pytest

from benchmarks import backward, results
from benchmarks.consumer_imitation import ASSEMBLED, Kernel
from benchmarks.inputs import find_shape, make_inputs


def test_an_architecture_needs_a_gpu_at_hand(capsys):
    with pytest.raises(SystemExit):
        backward.parse(["--arch", "89", "--device", "cpu"])
    assert "--arch 89 compiles for an H100 or H200 at hand, and the device is cpu" in capsys.readouterr().err
    assert backward.parse(["--arch", "89", "--device", "cuda"]).arch == 89


def test_only_what_an_h100_can_run_is_imitated(capsys):
    assert ASSEMBLED == (80, 86, 89)
    with pytest.raises(SystemExit):
        backward.parse(["--arch", "120", "--device", "cuda"])
    assert "invalid choice" in capsys.readouterr().err


class Imitated:
    def __init__(self, arch):
        same, other = {"HMMA.16816.F32.BF16": 64}, {"HMMA.1688.F32": 128}
        sizes = (8, 255, 0, 48 * 1024, 113 * 1024, 1)
        self.kernels = [Kernel("_key_gradient", *sizes, same, same), Kernel("_masked_sum", *sizes, same, other)]


def test_a_run_in_another_card_s_instructions_is_a_part_of_its_own(tmp_path, monkeypatch, capsys):
    q, k, v = make_inputs(find_shape("tiny"), device="cpu")
    args = backward.parse(["--device", "cpu", "--sparsities", "0.9", "--precisions", "int8"])
    args.arch, args.out = 89, tmp_path / "rows.json"
    monkeypatch.setattr(backward, "measure", lambda *_: {"ms": 6.0, "forward_ms": 2.0, "kept_bytes": None})
    results.save(args.out, {"environment": {}, "parts": {}, "rows": [{"part": "sm_89", "ms": 1.0}]})
    backward.time_methods(q, k, v, find_shape("tiny"), args, Imitated(89))
    content = json.loads(args.out.read_text())
    assert [(row["part"], row["ms"]) for row in content["rows"]] == [("sm_89", 1.0), ("backward sm_89", 6.0)]
    assert [kernel["name"] for kernel in content["parts"]["backward sm_89"]["kernels"]] == [
        "_key_gradient",
        "_masked_sum",
    ]
    assert "with backward    6.000 ms" in capsys.readouterr().out


def test_kernels_with_other_instructions_are_marked():
    table = backward.kernels_table(Imitated(89).kernels)
    assert "| _key_gradient | 8 | 255 | 0 | 48.0 | 1 |" in table and "| _masked_sum* |" in table


def test_a_sweep_in_another_card_s_instructions_times_each_part_s_own_kernels(monkeypatch, capsys):
    pytest.importorskip("triton")
    from sla2_kernels import triton_backward

    shipped, tried = triton_backward.backward_config, []

    def times(run, calls):
        tried.append(triton_backward.backward_config((8, 9), 2, 2))
        if len(tried) == 2:
            raise ValueError("sm_89 cannot start a kernel")
        return {name: (1.5, 1) for names in backward.KERNELS.values() for name in names} | {"_masked_sum": (9.0, 2)}

    monkeypatch.setattr(triton_backward, "takes_hopper_walks", triton_backward.takes_hopper_walks)
    monkeypatch.setattr(backward, "_backward_call", lambda *_: None)
    monkeypatch.setattr(backward, "median_ms", lambda *_, **__: 70.0)
    monkeypatch.setattr(backward, "kernel_times", times)
    backward.sweep(None, None, None, backward.parse(["--device", "cpu"]), Imitated(89))
    assert triton_backward.backward_config is shipped
    found, parts = shipped((8, 9), 2, 2), list(backward.MMA_TILES)
    assert tried == [replace(found, **{part: tile}) for part in parts for tile in backward.MMA_TILES[part]]
    assert [getattr(found, part) for part in parts] == [backward.MMA_TILES[part][0] for part in parts]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(tried) and lines[2].endswith("sm_89 cannot start a kernel")
    assert "4.500 ms: _linear_queries 1.500, _linear_sums 1.500, _linear_keys 1.500" in lines[-1]
