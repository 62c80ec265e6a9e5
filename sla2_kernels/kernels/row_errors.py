"""How far an attention output is from rows that were computed exactly: one launch.

_row_errors: one program, which adds up STEP rows of all heads at a time, so that the same rows give the same bits.
"""

import torch
import triton
import triton.language as tl

from .launch import cached, launch
from .numerics import is_finite

STEP = 128  # rows at a time


@triton.jit(do_not_specialize=["heads", "count", "rows_of_head", "fitted"])
def _row_errors(
    out, dense, rows, errors, out_stride_b, out_stride_h, out_stride_n, out_stride_d,
    dense_stride_b, dense_stride_h, dense_stride_r, dense_stride_d, rows_stride, heads, count, rows_of_head, fitted,
    D: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, D)
    error, energy, all_error, all_energy, left_out = 0.0, 0.0, 0.0, 0.0, 0.0
    for start in range(0, count, STEP):
        i = start + tl.arange(0, STEP)
        inside = i < count
        bh, r = (i // rows_of_head).to(tl.int64), i % rows_of_head
        b, h = bh // heads, bh % heads
        row = tl.load(rows + r * rows_stride, mask=inside, other=0).to(tl.int64)
        out_at = out + b * out_stride_b + h * out_stride_h + row * out_stride_n
        got = tl.load(out_at[:, None] + d * out_stride_d, mask=inside[:, None], other=0.0).to(tl.float32)
        dense_at = dense + b * dense_stride_b + h * dense_stride_h + r * dense_stride_r
        wanted = tl.load(dense_at[:, None] + d * dense_stride_d, mask=inside[:, None], other=0.0)  # [STEP, D]
        squares = tl.sum((got - wanted) * (got - wanted), axis=1)
        energies = tl.sum(wanted * wanted, axis=1)
        sound = is_finite(squares) & is_finite(energies)
        judged = sound & (r >= fitted)
        error += tl.sum(tl.where(judged, squares, 0.0), axis=0)
        energy += tl.sum(tl.where(judged, energies, 0.0), axis=0)
        all_error += tl.sum(tl.where(sound, squares, 0.0), axis=0)
        all_energy += tl.sum(tl.where(sound, energies, 0.0), axis=0)
        left_out += tl.sum(tl.where(sound, 0.0, 1.0), axis=0)
    tl.store(errors, error)
    tl.store(errors + 1, energy)
    tl.store(errors + 2, _quotient(error, energy))
    tl.store(errors + 3, _quotient(all_error, all_energy))
    tl.store(errors + 4, left_out)


@triton.jit
def _quotient(error, energy):
    """0 for a call without energy."""
    return tl.where(energy > 0, error / tl.where(energy > 0, energy, 1.0), 0.0)


def row_errors(out, dense, rows, fitted):
    """See fitted_attention.call_errors(), whose arguments these are."""
    batch, heads, _, head_dim = out.shape
    errors = torch.empty(5, dtype=torch.float32, device=out.device)

    def call():
        launch(
            _row_errors, (1,), out, dense, rows, errors, *out.stride(), *dense.stride(), rows.stride(0),
            heads, batch * heads * len(rows), len(rows), fitted, D=head_dim, STEP=STEP, options={"num_warps": 8},
        )  # fmt: skip

    cached((out, dense, rows, errors), ("row errors", fitted), call)
    return errors
