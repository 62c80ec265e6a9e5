"""Stage 2 and low-bit training on the miniature: a cut-off run ends where a whole one does, and its table says what runs said."""

import argparse
import functools
import json
import re
from dataclasses import replace

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

pytest.importorskip("peft")
pytest.importorskip("accelerate")

from benchmarks import stage2_miniature
from benchmarks.miniature_model import Miniature
from benchmarks.stage2_miniature import AFTER, BEFORE, FITTED, Outliers, TimedTrainer, videos
from sla2_kernels import load_router, sla2_attention
from sla2_training.optimisers import optimisers, take_step
from sla2_training.stage2 import add_lora, save_lora

TINY = ["--tiny", "--device", "cpu", "--sparsities", "0.6"]


def rows_in(folder):
    return json.loads((folder / "results.json").read_text())["rows"]


@pytest.mark.slow
def test_a_run_that_was_cut_off_ends_where_a_whole_one_does(tmp_path, monkeypatch, capsys):
    tiny = replace(Miniature.tiny("cpu"), size=(9, 96, 128))
    monkeypatch.setattr(Miniature, "tiny", lambda device: tiny)
    clips = functools.cache(lambda count, split: videos(tiny, count, split))
    monkeypatch.setattr(stage2_miniature, "videos", lambda miniature, count, split: clips(count, split))
    few = tmp_path / "few.safetensors"
    safetensors.torch.save_file({"diffusion_model.blocks.0.norm3.diff": torch.ones(tiny.model.config.dim)}, few)
    words = [*TINY, "--steps", "3", "--optimiser", "muon", "--trained", "int8", "--evaluated", "int8", "16bit"]
    words += ["--guided", "5", "--few-lora", f"8={few}"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    stage2_miniature.main([*words, "--out", str(whole)])
    assert [(row["run"], row["trained"], row["evaluated"]) for row in rows_in(whole)] == [
        (FITTED, None, "int8"), (FITTED, None, "16bit"), (BEFORE, None, "int8"), (BEFORE, None, "16bit"),
        (AFTER, "int8", "int8"), (AFTER, "int8", "16bit"),
    ]  # fmt: skip
    assert load_router(whole / "60-int8-none" / "router.safetensors").ratio(0, 0.6) is not None
    told = capsys.readouterr().out
    assert (whole / "table.md").read_text() in told
    assert re.search(r"step 3 of 3: distill loss [\d.]+, guidance 5 loss [\d.]+, 8 steps loss", told)

    step = TimedTrainer._forward_backward

    def out_of_time(self):
        self.until = 0.0 if self.step == 1 else self.until
        return step(self)

    with monkeypatch.context() as patched:
        patched.setattr(TimedTrainer, "_forward_backward", out_of_time)
        stage2_miniature.main([*words, "--out", str(cut)])
    assert "1 of 1 runs are left" in capsys.readouterr().out
    assert [row["run"] for row in rows_in(cut)] == [FITTED, FITTED, BEFORE, BEFORE]
    stage2_miniature.main([*words, "--out", str(cut)])
    for ours, theirs in zip(rows_in(cut), rows_in(whole), strict=True):
        assert ours | {key: theirs[key] for key in ("flow", "distance")} == theirs
        assert ours["flow"] == pytest.approx(theirs["flow"]) and ours["distance"] == pytest.approx(
            theirs["distance"], rel=1e-4
        )
    with pytest.raises(ValueError, match="has rows with steps 3"):
        stage2_miniature.main([*words, "--out", str(cut), "--steps", "2"])
    with pytest.raises(ValueError, match="has rows with guided 5.0, and this run has 4.0"):
        stage2_miniature.main([*words, "--out", str(cut), "--guided", "4"])


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (["8"], "'8' is not STEPS=FILE"),
        (["=a"], "is not STEPS=FILE"),
        (["8=a", "8=b"], "two files for the same number"),
        (["8=absent.safetensors"], "LoRA absent.safetensors cannot be read"),
        (["0=a"], "few_step_loras must name a file for each number of steps"),
    ],
)
def test_few_step_loras_that_are_not_one_for_each_number_of_steps(capsys, files, told):
    with pytest.raises(SystemExit):
        stage2_miniature.parse(["--out", "folder", "--few-lora", *files])
    assert told in capsys.readouterr().err


def test_a_run_begins_with_the_lora_of_another(tmp_path):
    made, begun = (add_lora(Miniature.tiny("cpu").model, 4, 4.0, ("self_attn", "ffn"), seed) for seed in (1, 2))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    save_lora(tmp_path / "lora.safetensors", made.state_dict(), 4.0, "a test")
    stage2_miniature.put_lora(begun, tmp_path / "lora.safetensors")
    found, wanted = begun.state_dict(), made.state_dict()
    for name in found:
        if "lora_" in name:
            torch.testing.assert_close(found[name], wanted[name], rtol=2**-8, atol=0)
    larger, smaller = (add_lora(Miniature.tiny("cpu").model, rank, rank, ("self_attn", "ffn")) for rank in (8, 2))
    stage2_miniature.put_lora(larger, tmp_path / "lora.safetensors")
    for module, theirs in zip(larger.modules(), made.modules(), strict=True):
        if hasattr(module, "get_delta_weight"):
            delta, wanted = (layer.get_delta_weight("default") for layer in (module, theirs))
            torch.testing.assert_close(delta, wanted, rtol=0, atol=0.02 * wanted.abs().max().item())
    with pytest.raises(ValueError, match="give the --lora-rank of that run"):
        stage2_miniature.put_lora(smaller, tmp_path / "lora.safetensors")
    save_lora(tmp_path / "twice.safetensors", made.state_dict(), 8.0, "alpha is twice the rank")
    stage2_miniature.put_lora(begun, tmp_path / "twice.safetensors")
    for name, tensor in begun.state_dict().items():
        if "lora_" in name:
            factor = 2 if "lora_B" in name else 1
            torch.testing.assert_close(tensor, factor * made.state_dict()[name], rtol=2**-8, atol=0)


def test_all_matrices_at_once_take_the_steps_of_torchs_muon():
    torch.manual_seed(0)
    one, other = ([torch.nn.Parameter(torch.ones(shape)) for shape in ((16, 32), (32, 16), (16, 32))] for _ in range(2))
    muon, adamw = optimisers("muon", one, [torch.nn.Parameter(torch.zeros(2))], 0.02, 0.1)
    batched, same = stage2_miniature.at_once(*optimisers("muon", other, [], 0.02, 0.1)[:1], adamw)
    assert same is adamw and batched.param_groups[0]["base"] == 0.02
    for _ in range(3):
        for a, b in zip(one, other, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimiser in (muon, batched):
            take_step((optimiser,), 0.5)
    for a, b in zip(one, other, strict=True):
        assert (a - b).norm() < 0.02 * (a - 1).norm()  # torch's is in bfloat16


def test_the_share_of_the_gap_between_fitted_and_dense():
    def row(run, flow, evaluated="int8"):
        return {"run": run, "sparsity": 0.97, "outliers": "none", "evaluated": evaluated, "router": "stage 1",
                "trained": None if run != AFTER else "int8", "flow": flow, "distance": 0.0, "dense_flow": 1.0}  # fmt: skip

    rows = [row(FITTED, 3.0), row(FITTED, 9.0, "16bit"), row(AFTER, 1.5), row(BEFORE, 2.0)]
    assert [stage2_miniature.closed(rows, r) for r in rows] == [0.0, 0.0, 0.75, 0.5]
    assert stage2_miniature.table(rows).splitlines()[-1].endswith("| int8 | int8 | 1.50000 | 1.500 | 0.000000 | 75% |")


def test_outliers_change_no_logit_and_cost_int8_only_where_channels_are_not_balanced():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 320, 2, 128) for _ in range(3))

    def dense(layer, q, k, v):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    gains = Outliers.parse("k:2:30")
    torch.testing.assert_close(gains(dense)(0, q, k, v), dense(0, q, k, v), atol=1e-5, rtol=1e-4)
    assert str(gains) == "k:2:30" and Outliers.parse("none")(dense) is dense
    with pytest.raises(argparse.ArgumentTypeError, match="SIDE:CHANNELS:GAIN"):
        Outliers.parse("v:2:30")

    def error(form):
        # no block left out, so that the linear branch, which gains change, has no weight
        def attend(layer, *tensors):
            precision = stage2_miniature.precision_of(form)
            return sla2_attention(*tensors, sparsity=0.0, precision=precision, layout="BNHD")

        with stage2_miniature.running(form):
            out = gains(attend)(0, q, k, v)
        exact = dense(0, q, k, v)
        return float((out - exact).norm() / exact.norm())

    balanced = error("int8")
    assert error("int8 plain") > 1.5 * balanced
    assert error("int8") == balanced  # the balance is back


def test_more_ratio_knots_begin_at_the_one_there_was():
    router = stage2_miniature.identity_router("wan", 1, 1, 128)
    assert stage2_miniature.with_knots(router, 4) is router
    learned = replace(
        router,
        sparsities=(0.9,),
        layers=(replace(router.layers[0], alpha_logits=torch.full((1, 1, 1), 2.0)),),
    )
    ratio = stage2_miniature.with_knots(learned, 4).ratio(0, 0.9)
    torch.testing.assert_close(ratio, torch.full((1, 4), 2.0).sigmoid())
    with pytest.raises(ValueError, match="has 4 already"):
        stage2_miniature.with_knots(stage2_miniature.with_knots(learned, 4), 2)
