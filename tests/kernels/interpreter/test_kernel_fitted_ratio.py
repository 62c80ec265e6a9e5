"""The sampled rows of a fitted ratio: dense attention of each, and the ratio per head, against float64."""

import math

import pytest
import torch
from operator_inputs import embedded, normal, relative_error

from sla2_kernels.fitted_attention import fitted_attention
from sla2_kernels.kernels.configs import fit_config
from sla2_kernels.kernels.fitted_ratio import FittedRatio, _splits
from sla2_kernels.kernels.pack import HOPPER_GROUP, register_order_of_channels
from sla2_kernels.kernels.product_order import channel_at
from sla2_kernels.reference import fitted_ratio, phi, sla2_reference
from sla2_kernels.router import block_count, top_k_blocks, unselected_mask
from sla2_kernels.torch_fit import fit_ratio
from sla2_kernels.triton_backend import Sample

ROWS, FITTED = 32, 24


def fit(q, k, v, selected, rows, query_block=128, order=0):
    """(ratio (B, H), dense (B, H, R, D)) of the kernels, with exact sums of the linear branch."""
    (batch, heads, tokens, head_dim), blocks = q.shape, block_count(k.shape[2], 64)
    unselected = unselected_mask(selected, blocks, torch.float32).flatten(0, 1)
    ratios = torch.full((batch * heads, block_count(tokens, query_block)), torch.nan)
    dense = torch.full((batch, heads, len(rows), head_dim), torch.nan)
    per_head = torch.full((batch, heads), torch.nan)
    fitted = FittedRatio(Sample(rows, FITTED, dense, per_head), ratios, query_block)
    config = fit_config((8, 9), q.element_size())
    fitted.attend(q, k, v, unselected, scale_log2=head_dim**-0.5 * math.log2(math.e), config=config)
    sums = linear_sums(k, v, unselected)
    h, channel = sums[..., :-head_dim].unflatten(-1, (head_dim, head_dim)), torch.arange(head_dim)
    if order == HOPPER_GROUP:
        h[..., register_order_of_channels.fn(channel)] = h.clone()
    elif order:
        h[:] = h[..., channel_at.fn(channel, head_dim)]
    for heads_slice in (slice(0, 1), slice(1, batch * heads)):
        fitted.fit(q, sums[heads_slice].contiguous(), heads_slice, order=order)
    assert (ratios == per_head.flatten()[:, None]).all()
    return per_head, dense


def linear_sums(k, v, unselected):
    """H_i and Z_i (B * H, T_m, (D + 1) * D) of the key blocks that each query block did not select."""
    k, v = k.double(), v.double()
    keys = k.shape[2]
    phi_k = phi(k - k.mean(dim=2, keepdim=True)).flatten(0, 1)  # (B * H, M, D)
    weight = unselected.double().repeat_interleave(64, dim=-1)[:, :, :keys]  # (B * H, T_m, M)
    values = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1).flatten(0, 1)
    h_and_z = torch.einsum("gim,gmd,gme->gied", weight, phi_k, values)  # (B * H, T_m, D + 1, D)
    h, z = h_and_z[:, :, :-1].transpose(2, 3), h_and_z[:, :, -1:]
    return torch.cat([h, z], dim=2).flatten(2).float()


def inputs(
    generator, *, batch=2, heads=2, tokens=300, keys=700, head_dim=64, count=3, dtype=torch.float32, query_block=128
):
    q, k, v = (embedded(normal(generator, batch, heads, n, head_dim).to(dtype)) for n in (tokens, keys, keys))
    k += 2 * normal(generator, batch, heads, 1, head_dim).to(dtype)
    scores = torch.rand(batch, heads, block_count(tokens, query_block), block_count(keys, 64), generator=generator)
    rows = torch.randperm(tokens, generator=generator)[:ROWS].to(torch.int32)
    return q, k, v, top_k_blocks(scores, count), rows


@pytest.mark.parametrize(
    ("sizes", "bound"),
    [
        ({}, 1e-5),
        ({"keys": 1001, "head_dim": 32, "batch": 1}, 1e-5),  # ragged last key block
        ({"tokens": 33, "keys": 1100, "batch": 1, "count": 7}, 1e-5),  # several programs a head
        ({"head_dim": 128, "dtype": torch.float16}, 2e-3),
        ({"head_dim": 128, "batch": 1, "order": HOPPER_GROUP}, 1e-5),
        ({"head_dim": 128, "batch": 1, "order": 64}, 1e-5),
        ({"head_dim": 32, "batch": 1, "order": 32}, 1e-5),
        ({"query_block": 64, "batch": 1}, 1e-5),
    ],
    ids=[
        "views",
        "ragged",
        "splits",
        "float16",
        "Hopper's order of channels",
        "INT8's order",
        "INT8's order of 32",
        "64 query tokens",
    ],
)
def test_ratio_and_exact_rows(generator, sizes, bound):
    sizes = dict(sizes)
    order = {"order": sizes.pop("order", 0)}
    q, k, v, selected, rows = inputs(generator, **sizes)
    block = {"query_block": sizes.get("query_block", 128)}
    expected, _ = fitted_ratio(q, k, v, selected, rows[:FITTED], **block)
    _, expected_dense = fitted_ratio(q, k, v, selected, rows, **block)
    ratios, dense = fit(q, k, v, selected, rows, **order, **block)
    assert relative_error(dense, expected_dense) < bound
    assert (ratios - expected).abs().max() < bound
    assert 0.05 < expected.min() and expected.max() < 0.95


def test_long_sequences_are_split_among_programs():
    assert _splits(40, 1182, 512) == (12, 99)
    assert _splits(1, 7, 512) == (1, 7)
    for batch_heads, blocks in ((1, 512), (12, 512), (56, 657), (500, 30)):
        splits, per_split = _splits(batch_heads, blocks, 512)
        assert (splits - 1) * per_split < blocks <= splits * per_split
        assert splits == 1 or splits * batch_heads <= 512


def test_rows_that_are_not_finite_are_left_out(generator):
    q, k, v, selected, rows = inputs(generator, batch=1)
    expected, _ = fitted_ratio(q, k, v, selected, rows[1:FITTED])
    q[:, :, rows[0]] = torch.nan
    ratios, dense = fit(q, k, v, selected, rows)
    assert (ratios - expected).abs().max() < 1e-5
    assert dense[:, :, 0].isnan().all() and dense[:, :, 1:].isfinite().all()


def test_where_the_branches_agree_the_selected_mass_decides(generator):
    q, k, v, selected, rows = inputs(generator, batch=1)
    v = torch.zeros_like(v)  # every average of it is 0, without rounding
    ratios, dense = fit(q, k, v, selected, rows)
    q, k, v = (x.double() for x in (q, k, v))
    expected = fit_ratio(q, k, v, selected, rows, FITTED, dense.double(), q.shape[3] ** -0.5, 128)
    assert ((expected > 0) & (expected < 1)).all() and (ratios - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("precision", "dtype", "layout", "bound"),
    [
        ("16bit", torch.float32, "BHND", 1e-5),
        ("int8", torch.float16, "BNHD", 0.06),
        ("fp8", torch.float16, "BHND", 0.06),
    ],
)
def test_the_operator_uses_what_it_fitted(generator, precision, dtype, layout, bound):
    q, k, v, selected, rows = inputs(generator, tokens=300, keys=450, dtype=dtype)
    ratio, dense = fitted_ratio(q, k, v, selected, rows[:FITTED])
    videos = [slice(b, b + 1) for b in range(len(q))]
    expected = torch.cat(
        [sla2_reference(q[b], k[b], v[b], alpha=ratio[b][0], key_blocks=selected[b])[0] for b in videos]
    )
    if layout == "BNHD":
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    found = fitted_attention(
        q, k, v, rows=rows, fitted=FITTED, precision=precision, layout=layout, key_blocks=selected, backend="triton"
    )
    out = found.out.transpose(1, 2) if layout == "BNHD" else found.out
    assert relative_error(out, expected) < bound
    assert relative_error(found.dense[:, :, :FITTED], dense) < 2e-3
    # in 8 bit the sums of the linear branch are in the input's own format
    assert (found.ratio - ratio).abs().max() < (1e-5 if dtype == torch.float32 else 2e-2)
