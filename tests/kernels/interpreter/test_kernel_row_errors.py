"""The errors of exactly computed rows, in one launch, against plain torch."""

import pytest
import torch
from operator_inputs import normal

from sla2_kernels.fitted_attention import call_errors
from sla2_kernels.kernels.row_errors import row_errors

FITTED = 24


@pytest.mark.parametrize(("batch", "heads", "layout"), [(1, 2, "BHND"), (2, 3, "BNHD")])
def test_the_errors_are_those_of_torch(generator, batch, heads, layout):
    out = normal(generator, batch, heads, 300, 64)
    if layout == "BNHD":
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
    rows = torch.randperm(300, generator=generator)[:32].to(torch.int32)
    dense = out[:, :, rows.long()] + 0.1 * normal(generator, batch, heads, 32, 64)
    out[0, 1, rows[3]] = torch.nan
    dense[0, 0, 30, 5] = torch.inf
    found = row_errors(out, dense, rows, FITTED)
    torch.testing.assert_close(found, call_errors(out, dense, rows, FITTED))  # in torch on a CPU
    assert found[4] == 2  # a row of each
    # 0.1 squared; over as few as 14 rows of 64 numbers the quotient's standard deviation is 7%
    assert 0.005 < found[2] < 0.02


def test_rows_without_energy_have_no_error():
    rows = torch.arange(32, dtype=torch.int32)
    found = row_errors(torch.zeros(1, 1, 64, 64), torch.zeros(1, 1, 32, 64), rows, FITTED)
    assert found.tolist() == [0.0] * 5
