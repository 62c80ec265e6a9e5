"""How far an attention output is from rows that were computed exactly, added to totals on the device: one launch.

_row_errors: one program, which adds up STEP rows of all heads at a time, so that the same rows give the same bits.
"""

import triton
import triton.language as tl

from .launch import cached, launch
from .numerics import is_finite

STEP = 128  # rows at a time


@triton.jit(do_not_specialize=["totals", "heads", "count", "rows_of_head", "fitted"])
def _row_errors(
    out, dense, rows, totals, out_stride_b, out_stride_h, out_stride_n, out_stride_d,
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
        errors = tl.sum((got - wanted) * (got - wanted), axis=1)
        energies = tl.sum(wanted * wanted, axis=1)
        sound = is_finite(errors) & is_finite(energies)
        judged = sound & (r >= fitted)
        error += tl.sum(tl.where(judged, errors, 0.0), axis=0)
        energy += tl.sum(tl.where(judged, energies, 0.0), axis=0)
        all_error += tl.sum(tl.where(sound, errors, 0.0), axis=0)
        all_energy += tl.sum(tl.where(sound, energies, 0.0), axis=0)
        left_out += tl.sum(tl.where(sound, 0.0, 1.0), axis=0)
    tl.store(totals, tl.load(totals) + error)
    tl.store(totals + 1, tl.load(totals + 1) + energy)
    tl.store(totals + 2, tl.load(totals + 2) + _quotient(error, energy))
    tl.store(totals + 3, tl.load(totals + 3) + _quotient(all_error, all_energy))
    tl.store(totals + 4, tl.load(totals + 4) + left_out)


@triton.jit
def _quotient(error, energy):
    """What a call without energy adds is 0."""
    return tl.where(energy > 0, error / tl.where(energy > 0, energy, 1.0), 0.0)


def add_row_errors(totals, out, dense, rows, fitted):
    """See fitted_attention.add_errors(), whose arguments these are."""
    batch, heads, _, head_dim = out.shape

    def call():
        launch(
            _row_errors, (1,), out, dense, rows, totals, *out.stride(), *dense.stride(), rows.stride(0),
            heads, batch * heads * len(rows), len(rows), fitted, D=head_dim, STEP=STEP, options={"num_warps": 8},
        )  # fmt: skip

    cached((out, dense, rows, totals), ("row errors", fitted), call)
