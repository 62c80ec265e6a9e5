"""Ratios that are fitted while a run samples: which calls fit, what the others take, and the error that the run measures."""

import pytest
import torch

HEADS, DIM = 2, 64


def tensors(seed, batch=1, tokens=300, requires_grad=False):
    """q, k, v as Wan hands them over, with keys that share a direction, so that attention is not flat."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, tokens, HEADS * DIM, generator=generator) for _ in range(3))
    return [t.requires_grad_(requires_grad) for t in (2 * q, k, v + 0.5)]


def split(tensor):
    return tensor.unflatten(2, (HEADS, DIM)).transpose(1, 2)


def dense(q, k, v):
    """In float64, as (B, L, H * D)."""
    out = torch.nn.functional.scaled_dot_product_attention(*(split(t.double()) for t in (q, k, v)))
    return out.transpose(1, 2).flatten(2)


def sample(b, steps, calls=2, halves=((1,), (0,)), batch=1):
    """A whole run of one layer: outputs of its calls, and the closed record. calls: of the layer in each model call."""
    sigmas, outputs = torch.linspace(1, 0, steps + 1), []
    b.hook.begin_run()
    for step in range(steps):
        for half in halves:
            b.model_call(float(sigmas[step]), sample_sigmas=sigmas, cond_or_uncond=list(half))
            outputs += [b.attend(*tensors(100 * step + call, batch), heads=HEADS, layer=0) for call in range(calls)]
    b.hook.end_run()
    return outputs, b.hook.runs.finished()[-1]


@pytest.fixture
def watched(pack_module, monkeypatch):
    """The operators' calls of a run: ("fitted", ratio) or ("given", alpha)."""
    module, seen = pack_module("nodes.attention.sparse_call"), []
    fit, mix = module.fitted_attention, module.sla2_attention

    def fitted_attention(*args, **options):
        found = fit(*args, **options)
        seen.append(("fitted", found.ratio))
        return found

    def sla2_attention(*args, alpha, **options):
        seen.append(("given", None if alpha is None else alpha.clone()))
        return mix(*args, alpha=alpha, **options)

    monkeypatch.setattr(module, "fitted_attention", fitted_attention)
    monkeypatch.setattr(module, "sla2_attention", sla2_attention)
    return seen


@pytest.mark.parametrize(("steps", "fits"), [(4, 8), (8, 16), (9, 6), (20, 10)])
def test_short_runs_fit_in_every_call_and_long_ones_in_every_fourth_of_a_half(bench, watched, steps, fits):
    sample(bench(), steps, calls=1)
    assert len(watched) == 2 * steps
    assert [kind for kind, _ in watched].count("fitted") == fits


def test_calls_between_take_the_ratio_of_their_own_half(bench, watched):
    sample(bench(), 12, calls=1)
    for half in (0, 1):
        last = None
        for number, (kind, ratio) in enumerate(watched[half::2]):
            assert kind == ("fitted" if number % 4 == 0 else "given")
            last = ratio.mean(dim=0) if kind == "fitted" else last
            assert kind == "fitted" or torch.equal(ratio, last)


def test_halves_in_one_batch_share_the_mean_of_their_ratios(bench, watched):
    sample(bench(), 9, calls=1, halves=[(1, 0)], batch=2)
    (first, ratio), (second, alpha) = watched[:2]
    assert (first, second) == ("fitted", "given") and ratio.shape == (2, HEADS)
    assert not torch.equal(ratio[0], ratio[1]) and torch.equal(alpha, ratio.mean(dim=0))


def test_without_a_sampler_every_call_fits(bench, watched, qkv):
    b = bench()
    for _ in range(3):
        b.model_call()
        b.attend(*qkv, heads=HEADS)
    assert [kind for kind, _ in watched] == ["fitted"] * 3


def test_the_same_run_twice_has_the_same_bits_and_draws_anew_in_every_call(bench, pack_module, monkeypatch):
    module, numbers = pack_module("nodes.attention.sparse_call"), []
    draw = module.sample_rows
    monkeypatch.setattr(module, "sample_rows", lambda n, number, d: numbers.append(number) or draw(n, number, d))
    b = bench()
    (first, one), (second, two) = (sample(b, 12) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert numbers[: len(numbers) // 2] == numbers[len(numbers) // 2 :]
    assert len(set(numbers)) == len(numbers) // 4  # both halves draw the same rows
    assert one.layers[0].attention_error == two.layers[0].attention_error


def shifted(fitted):
    """fitted_attention() that mixes by a ratio far from what it fitted."""

    def sabotaged(q, k, v, *, rows, **options):
        from sla2_kernels import sla2_attention

        found = fitted(q, k, v, rows=rows, **options)
        return found._replace(out=sla2_attention(q, k, v, alpha=torch.full((HEADS,), 0.02), **options))

    return sabotaged


@pytest.mark.parametrize(
    ("bit_width", "is_sabotaged"),
    [("16bit", False), ("int8", False), ("16bit", True)],
    ids=["16bit", "int8", "a wrong ratio"],
)
def test_the_measured_error_is_that_over_all_rows(bench, pack_module, monkeypatch, bit_width, is_sabotaged):
    module = pack_module("nodes.attention.sparse_call")
    if is_sabotaged:
        monkeypatch.setattr(module, "fitted_attention", shifted(module.fitted_attention))
    outputs, run = sample(bench(precision=bit_width, sparsity=0.7), 8, calls=4)
    inputs = [tensors(100 * step + call) for step in range(8) for _ in range(2) for call in range(4)]
    expected = torch.cat([dense(*qkv) for qkv in inputs])
    wanted = ((torch.cat(outputs).double() - expected).norm() / expected.norm()).item()
    assert run.layers[0].attention_error == pytest.approx(wanted, rel=0.1) and wanted > 0.05
    assert (wanted > 0.42) == is_sabotaged


def test_rows_that_are_not_finite_are_left_out_of_the_error(bench, pack_module):
    b, q, k, v = bench(), *tensors(0)
    rows = pack_module("nodes.attention.sparse_call").sample_rows(300, 1 << 20, "cpu")  # of the second call
    broken = q.clone()
    broken[:, rows[-1]] = torch.nan
    b.hook.begin_run()
    b.model_call()
    b.attend(q, k, v, heads=HEADS)
    out = b.attend(broken, k, v, heads=HEADS)
    assert out[:, rows[-1]].isnan().all()
    b.hook.end_run()
    (run,) = b.hook.runs.finished()
    assert 0 < run.layers[0].attention_error < 1 and run.layers[0].not_finite == 1
    left_out = f"{HEADS} sampled rows with NaN or infinity have no part in the ratios and the attention error"
    assert left_out in run.notes and run.layers[0].rows_left_out == HEADS
    assert any(note.startswith("sparse outputs with NaN or infinity: 1 in layer 0") for note in run.notes)


def test_a_call_all_of_whose_rows_are_left_out_does_not_dilute_the_error(bench):
    b, qkv = bench(), tensors(0)
    b.hook.begin_run()
    b.model_call()
    b.attend(*qkv, heads=HEADS)
    b.attend(*(torch.full_like(t, torch.nan) for t in qkv), heads=HEADS)
    b.hook.end_run()
    (run,) = b.hook.runs.finished()
    assert run.layers[0].sparse == 2
    assert run.attention_error == pytest.approx(run.layers[0].attention_error)


@pytest.mark.parametrize("reentrant", [False, True])
def test_training_estimates_the_ratio(bench, watched, reentrant):
    b, qkv = bench(), tensors(0, requires_grad=True)
    b.model_call()
    torch.utils.checkpoint.checkpoint(
        lambda *t: b.attend(*t, heads=HEADS), *qkv, use_reentrant=reentrant
    ).square().sum().backward()
    assert watched == [("given", None)] * 2 and b.run.layers[0].sparse == 1


def test_a_call_in_a_cuda_graph_estimates_the_ratio(bench, watched, qkv, pack_module, monkeypatch):
    monkeypatch.setattr(pack_module("nodes.attention.self_attention"), "capturing", lambda device: True)
    b = bench()
    b.model_call()
    b.attend(*qkv, heads=HEADS)
    assert watched == [("given", None)]


def test_a_call_that_keeps_every_block_fits_nothing(bench, watched, qkv):
    b = bench(sparsity=0.0)
    b.model_call()
    b.attend(*qkv, heads=HEADS)
    assert watched == [("given", None)]


@pytest.fixture
def router(pack_module):
    """router(logits or None): of the bench's model, trained at 0.5."""
    weights = pack_module("sla2_kernels.weights")

    def make(logits):
        layer = weights.RouterLayer(torch.eye(DIM) + 0.05, torch.eye(DIM), logits)
        sparsities = () if logits is None else (0.5,)
        return weights.RouterWeights((layer,) * 4, "wan", HEADS, DIM, sparsities=sparsities)

    return make


@pytest.mark.parametrize(
    ("mode", "has_ratios", "kind", "name"),
    [
        ("learned", True, "given", "learned"),
        ("learned", False, "fitted", "fitted (no trained ratio)"),
        ("learned", None, "fitted", "fitted (no trained ratio)"),
        ("fitted", True, "fitted", "fitted"),
        ("estimated", False, "given", "estimated"),
        ("fixed", None, "given", "fixed at 0.9"),
    ],
)
def test_what_is_fitted(bench, watched, qkv, router, pack_module, mode, has_ratios, kind, name):
    given = None if has_ratios is None else router(torch.zeros(1, HEADS, 1) if has_ratios else None)
    b = bench(router=given, ratio_mode=mode)
    b.model_call()
    b.attend(*qkv, heads=HEADS)
    assert [found for found, _ in watched] == [kind]
    assert pack_module("nodes.runs.report_text").ratio_name(b.hook) == name


def test_the_error_is_in_the_report_and_on_the_node(bench, pack_module, qkv):
    b = bench()
    b.hook.begin_run()
    b.model_call()
    for layer in (0, 2):
        b.attend(*qkv, heads=HEADS, layer=layer)
    b.hook.end_run()
    (run,) = b.hook.runs.finished()
    low, high = sorted(run.layers[layer].attention_error for layer in (0, 2))
    overall = ((low**2 + high**2) / 2) ** 0.5
    words = f"attention error {overall:.2f} (layers {low:.2f} to {high:.2f})"
    report, outcome = pack_module("nodes.runs.report_text"), pack_module("nodes.runs.outcome")
    data, lines = report.report_data(b.hook, run), report.report_text(b.hook, run).splitlines()
    assert data["attention_error"] == pytest.approx(overall)
    assert lines[0].endswith(f", {words}") and words in outcome.outcome(b.hook, run)["headline"]
    row = next(row for row in data["layers"] if row["layer"] == 2)
    assert f"attention error {row['attention_error']:.3f}" in next(
        line for line in lines if line.startswith("layer 2:")
    )


def test_a_run_that_measures_no_error_says_nothing_of_it(bench, pack_module, qkv):
    b = bench(ratio_mode="estimated")
    b.model_call()
    b.attend(*qkv, heads=HEADS)
    (run,) = b.hook.runs.finished()
    assert run.layers[0].attention_error is None
    assert "attention error" not in pack_module("nodes.runs.report_text").report_text(b.hook, run)


def test_what_a_run_keeps_is_made_before_its_model_calls(bench, pack_module):
    hook = bench().hook
    hook.begin_run()
    hook.before_model(torch.device("cpu"), {"sigmas": torch.tensor([0.5]), "cond_or_uncond": [1, 0]})
    kept = hook.run_for_call().fitted_ratios._kept
    assert set(kept) == {(layer, torch.device("cpu"), 0.5, (1, 0)) for layer in range(4)}
    hook.end_run("stopped before its end")
    assert not kept
