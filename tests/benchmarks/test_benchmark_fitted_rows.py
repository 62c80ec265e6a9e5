"""The study of sampled rows at tiny size: its errors are those of the mix, and more rows come closer to the bound."""

import pytest
import torch

from benchmarks import fitted_rows
from benchmarks.fitted_rows import Tap, error, fitted_ratio, table
from sla2_kernels.reference import sla2_reference
from sla2_kernels.router import router_scores, top_k_blocks, with_diagonal

SPARSITY = 0.5


@pytest.fixture
def qkv():
    # (1, N, H, D) in bfloat16's numbers
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(1, 300, 2, 32, generator=generator).bfloat16().float() for _ in range(3)]


@pytest.mark.parametrize("query_block", [128, 64])
def test_errors_are_those_of_the_operator(qkv, query_block):
    tap = Tap((SPARSITY,), 20, 280, query_block)
    for _ in range(2):  # both halves of guidance
        tap(0, *qkv)
    q, k, v = (x.transpose(1, 2) for x in qkv)
    rows = torch.randperm(300, generator=torch.Generator().manual_seed(0))[20:]
    dense = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in (q, k, v)))[:, :, rows]
    selected = top_k_blocks(with_diagonal(router_scores(q, k, query_block=query_block), 0, query_block), 2)
    for ratio, alpha in ((None, None), (torch.tensor([[0.3, 0.6]], dtype=torch.float64), torch.tensor([0.3, 0.6]))):
        out, _ = sla2_reference(q, k, v, alpha=alpha, key_blocks=selected, query_block=query_block)
        expected = (out[:, :, rows] - dense).norm() / dense.norm()

        def choose(calls, step, half, layer, ratio=ratio):
            return ratio

        # the second call draws other rows: the first one alone is compared
        alone = Tap((SPARSITY,), 20, 280)
        alone.calls = {(0, half, 0): tap.calls[0, 0, 0] for half in (0, 1)}
        assert error([alone], [0], choose)[0] == pytest.approx(float(expected), rel=1e-3)


def test_more_rows_come_closer_to_the_bound(qkv):
    tap = Tap((SPARSITY,), fitted=64, judged=200)
    for _ in range(16):
        tap(0, *qkv)
    assert fitted_ratio([tap.calls[0, 0, 0]], 64).shape == (1, 2)
    found = dict(table([tap], (8, 32, 64), 2))
    bound = found["bound: fitted on the judged rows"][0]
    few, many = (found[f"fitted 0 steps before, {count} rows"][0] for count in (8, 64))
    assert bound <= many < few < found["estimated from block means"][0]


def test_tiny_mode_prints_the_table(capsys):
    fitted_rows.main(["--tiny", "--device", "cpu", "--videos", "1"])
    assert "fitted in every 4th step, 16 rows" in capsys.readouterr().out
