"""A ratio fitted in the call: the torch backend against the definition, and which rows are drawn."""

import pytest
import torch
from operator_inputs import attention_inputs, relative_error

from sla2_kernels import select_key_blocks, sla2_attention
from sla2_kernels.fitted_attention import (
    FITTED_ROWS,
    SAMPLE_ROWS,
    call_errors,
    fitted_attention,
    sample_rows,
    squared_error,
)
from sla2_kernels.reference import fitted_ratio, sla2_reference

SPARSITY = 0.6


@pytest.mark.parametrize("layout", ["BHND", "BNHD"])
@pytest.mark.parametrize(("keys", "query_block"), [(300, 128), (450, 128), (450, 64)])
def test_ratio_rows_and_output_are_the_definitions(generator, keys, query_block, layout):
    inputs = attention_inputs(generator, batch=2, tokens=300, keys=keys, head_dim=32, dtype=torch.float64)
    q, k, v = inputs.q, inputs.k, inputs.v
    block = {"query_block": query_block}
    rows, selected = sample_rows(300, 5), select_key_blocks(q, k, sparsity=SPARSITY, **block)
    ratio, _ = fitted_ratio(q, k, v, selected, rows[:FITTED_ROWS], **block)
    _, dense = fitted_ratio(q, k, v, selected, rows, **block)
    videos = [slice(b, b + 1) for b in range(2)]
    expected = torch.cat(
        [sla2_reference(q[b], k[b], v[b], alpha=ratio[b][0], key_blocks=selected[b], **block)[0] for b in videos]
    )
    if layout == "BNHD":
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    found = fitted_attention(q, k, v, rows=rows, sparsity=SPARSITY, precision="16bit", layout=layout, **block)
    out = found.out.transpose(1, 2) if layout == "BNHD" else found.out
    assert relative_error(out, expected) < 1e-10
    assert relative_error(found.dense, dense) < 1e-6 and (found.ratio - ratio).abs().max() < 1e-6  # they are float32
    assert 0.01 < ratio.min() and ratio.max() < 0.99


def test_it_is_closer_to_dense_attention_than_the_estimate(generator):
    inputs = attention_inputs(generator, tokens=700, head_dim=32)
    dense = torch.nn.functional.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v)
    options = {"sparsity": SPARSITY, "precision": "16bit"}
    estimated = sla2_attention(inputs.q, inputs.k, inputs.v, **options)
    found = fitted_attention(inputs.q, inputs.k, inputs.v, rows=sample_rows(700, 1), **options)
    assert relative_error(found.out, dense) < relative_error(estimated, dense)


def test_a_number_draws_one_sample_spread_over_all_rows():
    rows = sample_rows(3200, 7)
    assert torch.equal(rows, sample_rows(3200, 7)) and not torch.equal(rows, sample_rows(3200, 8))
    assert (rows.sort().values // 100).tolist() == list(range(SAMPLE_ROWS))
    first = rows[:FITTED_ROWS].sort().values
    assert first[0] < 1000 and first[-1] > 2200, "both parts of it are spread"
    assert 0 <= sample_rows(5, 7).min() and sample_rows(5, 7).max() < 5


@pytest.mark.parametrize("tokens", [1, 5, 32, 3001, 32760, 2**31 - 1])
def test_the_highest_draw_is_a_row_too(monkeypatch, tokens):
    """31 and the highest number below 1 add up to 32."""
    monkeypatch.setattr("random.Random.random", lambda self: 1 - 2.0**-53)
    assert sample_rows(tokens, 7).max() == tokens - 1


def test_rows_that_are_not_finite_are_no_error(generator):
    dense = torch.randn(1, 2, 3, 8, generator=generator)
    out = torch.zeros(1, 2, 10, 8)
    rows = torch.tensor([1, 4, 9], dtype=torch.int32)
    out[:, :, rows] = 2 * dense
    out[0, 1, 4, 0] = torch.nan
    kept = dense.clone()
    kept[0, 1, 1] = 0
    assert torch.allclose(squared_error(out, dense, rows), kept.square().sum().expand(2))


def test_the_totals_tell_judged_rows_from_all_and_count_those_left_out(generator):
    dense = torch.randn(2, 3, 32, 8, generator=generator)
    rows, out = sample_rows(300, 1), torch.zeros(2, 3, 300, 8)
    out[:, :, rows] = 1.1 * dense
    out[:, :, rows[:FITTED_ROWS]] -= 0.05 * dense[:, :, :FITTED_ROWS]  # fitted rows have less error
    out[1, 2, rows[30], 0] = torch.inf
    judged, energy = dense[:, :, FITTED_ROWS:].clone(), dense.square().sum()
    judged[1, 2, 30 - FITTED_ROWS] = 0
    energy -= dense[1, 2, 30].square().sum()
    found = call_errors(out, dense, rows)
    wanted = 0.01 * judged.square().sum(), judged.square().sum(), torch.tensor(0.01)
    everything = (0.0025 * dense[:, :, :FITTED_ROWS].square().sum() + wanted[0]) / energy
    torch.testing.assert_close(found, torch.stack([*wanted, everything, torch.tensor(1.0)]), rtol=1e-3, atol=1e-4)


def test_totals_of_calls_without_any_energy_stay(generator):
    found = call_errors(torch.zeros(1, 1, 64, 8), torch.zeros(1, 1, 32, 8), sample_rows(64, 1))
    assert found.tolist() == [0.0] * 5


def test_rows_that_are_not_finite_have_no_part_in_the_ratio(generator):
    inputs = attention_inputs(generator, tokens=300, head_dim=32)
    q, k, v = inputs.q, inputs.k, inputs.v
    rows, options = sample_rows(300, 5), {"sparsity": SPARSITY, "precision": "16bit"}
    selected = select_key_blocks(q, k, sparsity=SPARSITY)
    expected, _ = fitted_ratio(q, k, v, selected, rows[1:FITTED_ROWS])
    broken = q.clone()
    broken[:, :, rows[0]] = torch.nan
    found = fitted_attention(broken, k, v, rows=rows, key_blocks=selected, **options)
    assert (found.ratio - expected).abs().max() < 1e-5
    assert found.dense[:, :, 0].isnan().all() and found.dense[:, :, 1:].isfinite().all()


def test_where_both_branches_agree_the_ratio_is_the_selected_mass(generator):
    inputs = attention_inputs(generator, tokens=300, head_dim=32)
    rows = sample_rows(300, 5)

    def fitted(v):
        return fitted_attention(inputs.q, inputs.k, v, rows=rows, sparsity=SPARSITY, precision="16bit")

    # every average of zeros is 0 to the bit, so that the fit is singular
    ratio = fitted(torch.zeros_like(inputs.v)).ratio
    assert ((ratio > 0) & (ratio < 1)).all()
    # of ones it is 1 but for rounding, which then decides the ratio: any is right
    ones = torch.ones_like(inputs.v)
    found = fitted(ones)
    assert ((found.ratio >= 0) & (found.ratio <= 1)).all()
    torch.testing.assert_close(found.out, ones)


def test_it_has_no_gradients(generator):
    inputs = attention_inputs(generator, tokens=300, head_dim=32)
    with pytest.raises(ValueError, match="a fitted ratio has no gradients: train with sla2_attention and alpha=None"):
        fitted_attention(inputs.q.requires_grad_(), inputs.k, inputs.v, rows=sample_rows(300, 1), sparsity=SPARSITY)
