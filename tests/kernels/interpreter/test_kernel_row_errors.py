"""The errors of exactly computed rows, added up in one launch, against plain torch."""

import pytest
import torch
from operator_inputs import normal

from sla2_kernels.fitted_attention import add_errors
from sla2_kernels.kernels.row_errors import add_row_errors

FITTED = 24


@pytest.mark.parametrize(("batch", "heads", "layout"), [(1, 2, "BHND"), (2, 3, "BNHD")])
def test_the_totals_are_those_of_torch(generator, batch, heads, layout):
    out = normal(generator, batch, heads, 300, 64)
    if layout == "BNHD":
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
    rows = torch.randperm(300, generator=generator)[:32].to(torch.int32)
    dense = out[:, :, rows.long()] + 0.1 * normal(generator, batch, heads, 32, 64)
    out[0, 1, rows[3]] = torch.nan
    dense[0, 0, 30, 5] = torch.inf
    found, expected = torch.ones(5), torch.ones(5)
    for _ in range(2):
        add_row_errors(found, out, dense, rows, FITTED)
        add_errors(expected, out, dense, rows, FITTED)  # in torch on a CPU
    torch.testing.assert_close(found, expected)
    assert found[4] == 1 + 2 * 2  # a row of each, twice
    # 0.1 squared; over as few as 14 rows of 64 numbers the quotient's standard deviation is 7%
    assert 0.005 < (found[2] - 1) / 2 < 0.02


def test_rows_without_energy_add_nothing(generator):
    totals, rows = torch.zeros(5), torch.arange(32, dtype=torch.int32)
    add_row_errors(totals, torch.zeros(1, 1, 64, 64), torch.zeros(1, 1, 32, 64), rows, FITTED)
    assert totals.tolist() == [0.0] * 5
