"""The experiments: their parts against brute force, and a whole run at tiny size."""

import itertools

import torch

from benchmarks.router_studies.budgets import _heads_as_layers, spread
from benchmarks.router_studies.frozen import freeze
from benchmarks.router_studies.orders import morton_order, tile_order
from benchmarks.router_studies.query_blocks import choice_errors
from benchmarks.router_studies.ratios import Rows, fit_constant, fit_knots, hat_basis
from benchmarks.router_studies.routers import VARIANTS
from benchmarks.router_studies.studies import STUDIES, run_studies
from benchmarks.router_studies.training import evaluate
from benchmarks.synthetic import synthetic_captures
from miniature.captures import Recorder, load_captures, save_captures
from sla2_training import RouterTrainer, TrainerOptions
from sla2_training.layer_tensors import LayerTensors
from sla2_training.report import BEFORE

GRID = (2, 16, 32)


def test_every_study_prints_its_table(monkeypatch):
    for name in list(VARIANTS)[3:]:
        monkeypatch.delitem(VARIANTS, name)
    train = synthetic_captures(2, layers=1, grid=GRID)
    held_out = synthetic_captures(1, layers=1, first_seed=100, grid=GRID)
    said = []
    options = TrainerOptions(query_blocks=2)
    run_studies(train, held_out, steps=2, sparsities=(0.8, 0.5), options=options, say=said.append)
    text = "\n".join(said)
    assert len(said) == 2 * len(STUDIES)
    for row in (
        "untrained",
        "blocks of most true mass",
        "best per row (bound)",
        "spread over heads",
        "Morton, trained",
        "64 query tokens, own key blocks kept",
    ):
        assert row in text
    assert "nan" not in text and "inf" not in text


def test_heads_as_layers_keep_how_the_router_was_trained():
    options = TrainerOptions(query_block=64, keep_diagonal=False)
    router = RouterTrainer("m", 3, 2, 32, sparsities=(0.8,), options=options).router()
    _, split = _heads_as_layers([], router)
    assert (split.num_layers, split.num_heads, split.q_block, split.keep_diagonal) == (6, 1, 64, False)


def test_frozen_layers_give_what_a_fresh_computation_gives():
    capture = synthetic_captures(1, layers=1, grid=GRID)[0]
    frozen = freeze([capture], 3)[0]
    errors = []
    for tensors in (frozen, frozen, LayerTensors(0, capture.q, capture.k, capture.v, "BHND", None)):
        if tensors is not frozen:
            tensors.draw = lambda count, generator: frozen.blocks
        trainer = RouterTrainer("m", 1, 2, 32, sparsities=(0.8,), options=TrainerOptions(query_blocks=3))
        trainer.observe_tensors(tensors)
        errors.append(trainer.evaluate_tensors(tensors).relative(("trained", "learned"), 0.8))
    assert errors[0] == errors[1] == errors[2]
    assert len(frozen.kept) == 1 and frozen.draw(2, None).shape[2] == 2


def test_choices_of_a_whole_query_block_have_the_trainers_own_error():
    captures = synthetic_captures(2, layers=1, grid=GRID)
    for keep_diagonal in (False, True):
        options = TrainerOptions(query_blocks=3, keep_diagonal=keep_diagonal)
        trainer = RouterTrainer("m", 1, 2, 32, sparsities=(0.8, 0.5), options=options)
        errors = choice_errors(trainer, captures, 128)
        report = evaluate(trainer, captures, [BEFORE])
        torch.testing.assert_close(errors, [report.overall(BEFORE, s) for s in (0.8, 0.5)])


def test_choices_of_half_a_query_block_against_dense_masks():
    """The error of a choice per 64 query tokens, computed anew in float64 with a mask over all tokens; a ragged end."""
    capture = synthetic_captures(1, layers=1, grid=(2, 16, 31))[0]
    q, k, v = (x.double() for x in (capture.q, capture.k, capture.v))
    tokens, scale = q.shape[2], q.shape[3] ** -0.5
    smooth = k - k.mean(dim=2, keepdim=True)
    of_block = torch.arange(tokens) // 64
    member = torch.nn.functional.one_hot(of_block).double()
    mean = member.T / member.sum(dim=0)[:, None]
    scores = (mean @ q) @ (mean @ smooth).transpose(2, 3)
    scores = scores.masked_fill(torch.eye(scores.shape[-1], dtype=torch.bool), torch.inf)
    blocks = torch.zeros_like(scores).scatter(3, scores.topk(scores.shape[-1] // 2, dim=3).indices, 1.0)
    keep = blocks[:, :, of_block][..., of_block]
    logits = q @ smooth.transpose(2, 3) * scale
    dense = logits.softmax(dim=-1) @ v
    sparse = logits.masked_fill(keep == 0, -torch.inf).softmax(dim=-1) @ v
    linear = (q.softmax(-1) @ smooth.softmax(-1).transpose(2, 3)) * (1 - keep)
    linear = linear @ v / linear.sum(dim=-1, keepdim=True)
    means = q @ (mean @ smooth).transpose(2, 3) * scale + member.sum(dim=0).log()
    rest = means.masked_fill(blocks[:, :, of_block] > 0, -torch.inf).logsumexp(dim=-1)
    selected = logits.masked_fill(keep == 0, -torch.inf).logsumexp(dim=-1)
    ratio = torch.sigmoid(selected - rest)[..., None]
    expected = ((ratio * sparse + (1 - ratio) * linear - dense).norm() / dense.norm()).item()
    options = TrainerOptions(query_blocks=99, keep_diagonal=True)
    trainer = RouterTrainer("m", 1, q.shape[1], q.shape[3], sparsities=(0.5,), options=options)
    torch.testing.assert_close(choice_errors(trainer, [capture], 64), [expected], rtol=1e-4, atol=0)


def test_captures_survive_a_file(tmp_path):
    captures = synthetic_captures(2, grid=GRID)
    save_captures(tmp_path / "c.safetensors", captures)
    for ours, loaded in zip(captures, load_captures(tmp_path / "c.safetensors"), strict=True):
        assert (ours.layer, ours.grid) == (loaded.layer, loaded.grid)
        assert all(torch.equal(getattr(ours, name), getattr(loaded, name)) for name in "qkv")


def test_recorder_keeps_every_second_call_and_runs_dense():
    recorder = Recorder(GRID, every=2, dtype=torch.bfloat16)
    q, k, v = (torch.randn(1, 1024, 2, 32) for _ in range(3))
    for _ in range(3):
        out = recorder(5, q, k, v)
    dense = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    torch.testing.assert_close(out, dense.transpose(1, 2))
    assert [c.layer for c in recorder.captures] == [5, 5]
    assert recorder.captures[0].q.shape == (1, 2, 1024, 32) and recorder.captures[0].q.dtype == torch.bfloat16


def test_spread_is_the_cheapest_of_all_choices():
    errors = torch.rand(3, 5, generator=torch.Generator().manual_seed(0)).sort(dim=1, descending=True).values
    chosen = spread(errors, 2)
    cost = {
        units: sum(float(errors[i, u - 1]) for i, u in enumerate(units))
        for units in itertools.product(range(1, 6), repeat=3)
        if sum(units) <= 6
    }
    assert sum(chosen) <= 6 and abs(cost[tuple(chosen)] - min(cost.values())) < 1e-9


def test_orders_are_permutations_and_tiles_are_contiguous():
    for grid in ((4, 8, 8), (3, 7, 5)):
        tokens = grid[0] * grid[1] * grid[2]
        for order in (morton_order(grid), tile_order(grid, (2, 4, 8)), tile_order(grid, (4, 4, 4))):
            assert torch.equal(order.sort().values, torch.arange(tokens))
    first = tile_order((4, 8, 8), (4, 4, 4))[:64]
    t, y, x = first // 64, first % 64 // 8, first % 8
    assert t.max() == 3 and y.max() == 3 and x.max() == 3
    assert torch.equal(morton_order((2, 2, 2)), torch.arange(8))


def test_fitted_ratios_are_the_best_ones():
    torch.manual_seed(0)
    n, p = torch.rand(2, 400, 1) + 0.1, torch.rand(2, 400, 1) * 0.3
    rows = Rows(torch.ones(2, 400, 1), p, n, p, p, p, torch.rand(2, 400), torch.tensor(1.0))
    constant, knots = fit_constant(rows), fit_knots(rows, 4)
    assert rows.error(constant) < min(rows.error(constant + 0.01), rows.error(constant - 0.01))
    basis = hat_basis(rows.position, 4)
    torch.testing.assert_close(basis.sum(dim=-1), torch.ones(2, 400))
    best = rows.error(basis @ knots)
    assert best <= rows.error(constant)
    for nudge in 0.01 * torch.eye(4)[:, None, :, None]:
        assert best < rows.error(basis @ (knots + nudge))
