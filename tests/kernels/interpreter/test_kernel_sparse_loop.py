"""The linear branch and the sparse loop that mixes it in: selection, linear sums and ratios are handed in."""

import math
from dataclasses import replace

import pytest
import torch
from operator_inputs import embedded, normal, relative_error

from sla2_kernels.kernels.backward_configs import backward_config
from sla2_kernels.kernels.configs import LoopConfig, linear_config, loop_config, mass_config
from sla2_kernels.kernels.linear_attention import linear_attention
from sla2_kernels.kernels.product_order import channel_at
from sla2_kernels.kernels.sparse_attention import sparse_attention
from sla2_kernels.kernels.unselected_mass import unselected_mass
from sla2_kernels.reference import phi, pool
from sla2_kernels.router import block_count, top_k_blocks, unselected_mask
from sla2_kernels.triton_backend import Routing, Workspace

BATCH, HEADS = 1, 3
LOOP = LoopConfig(tile_m=128, num_warps=4, num_stages=2)


class Loop:
    """One call in 16 bit: q (B, H, N, D) against k and v, ``count`` random key blocks per query block."""

    def __init__(self, generator, *, tokens, keys, count, head_dim=64, linear=True, ratios=True, query_block=128):
        self.query_block = query_block
        self.q, self.k, self.v = (
            embedded(normal(generator, BATCH, HEADS, length, head_dim)) for length in (tokens, keys, keys)
        )
        q_blocks, k_blocks = block_count(tokens, query_block), block_count(keys, 64)
        self.selected = top_k_blocks(torch.rand(BATCH * HEADS, q_blocks, k_blocks, generator=generator), count)
        mask = unselected_mask(self.selected[None], k_blocks, torch.float32)[0]
        mean = self.k.mean(dim=2)
        k_means = pool(self.k, 64) - mean[:, :, None]
        self.routed = Routing(mask, k_means.flatten(0, 1), mean.flatten(0, 1))
        # sums of any numbers do: the loop only multiplies phi(q) with them
        self.sums = normal(generator, BATCH * HEADS, q_blocks, head_dim + 1, head_dim).abs() if linear else None
        self.ratios = torch.rand(HEADS, q_blocks, generator=generator) if ratios else None

    def run(self, heads=slice(0, BATCH * HEADS), tile=128, ordered=False):
        """(out, ratio); out is a view between NaN. ordered: H_i's channels come in the places of product_order.py."""
        out = embedded(torch.full_like(self.q, torch.nan).nan_to_num(7.0))
        ratio_of_rows = torch.full(self.q.shape[:3], torch.nan)
        config, block = replace(LOOP, tile_m=min(tile, self.query_block)), self.query_block
        sums = None if self.sums is None else self.sums[heads].clone()
        if ordered:
            head_dim = self.q.shape[3]
            sums[:, :, :-1] = sums[:, :, :-1, channel_at.fn(torch.arange(head_dim), head_dim)]
        work = Workspace(query_sums=sums)
        sizes = {"scale_log2": self.q.shape[3] ** -0.5 * math.log2(math.e)}
        kind = "none" if sums is None else "estimated" if self.ratios is None else "learned"
        if kind == "estimated":
            config_of_mass = mass_config((8, 9), 4, block)
            unselected_mass(
                self.q,
                self.routed,
                ratio_of_rows,
                self.k.shape[2],
                block,
                smoothed=False,
                config=config_of_mass,
                **sizes,
            )
        if sums is not None:
            branch = linear_config((8, 9), 4)
            linear_attention(
                self.q, work, out, self.ratios, ratio_of_rows, heads, query_block=block, ordered=ordered, config=branch
            )
        sparse_attention(
            self.q, self.k, self.v, out, work, None, self.selected, ratio_of_rows, heads,
            query_block=block, ratio_kind=kind, qk="16bit", pv="16bit", config=config, **sizes,
        )  # fmt: skip
        assert out._base.isnan().sum() == out._base.numel() - out.numel(), "wrote between the output's elements"
        return out, ratio_of_rows

    def expected(self):
        """(out, ratio) in float64."""
        q, k, v = (x.double().flatten(0, 1) for x in (self.q, self.k, self.v))
        tokens = k.shape[1]
        of_token = self.routed.unselected.bool().repeat_interleave(64, dim=2)[..., :tokens]
        of_row = of_token.repeat_interleave(self.query_block, dim=1)[:, : q.shape[1]]
        logits = q @ (k - k.mean(dim=1, keepdim=True)).transpose(1, 2) * q.shape[2] ** -0.5
        selected_logits = logits.masked_fill(of_row, -torch.inf)
        o_sparse = selected_logits.softmax(dim=-1) @ v
        if self.sums is None:
            return self._by_head(o_sparse), torch.ones(self.q.shape[:3])
        sums = self.sums.double().repeat_interleave(self.query_block, dim=1)[:, : q.shape[1]]
        phi_q = phi(q)[..., None, :]
        o_linear = (phi_q @ sums[:, :, :-1] / (phi_q @ sums[:, :, -1, :, None]))[..., 0, :]
        if self.ratios is not None:
            ratio = self.ratios.double().repeat_interleave(self.query_block, dim=1)[:, : q.shape[1]].repeat(BATCH, 1)
        else:
            valid = torch.full((self.routed.k_means.shape[1],), 64.0, dtype=torch.float64)
            valid[-1] = tokens - 64 * (len(valid) - 1)
            rest = q @ self.routed.k_means.double().transpose(1, 2) * q.shape[2] ** -0.5 + valid.log()
            mask = self.routed.unselected.bool().repeat_interleave(self.query_block, dim=1)[:, : q.shape[1]]
            rest = rest.masked_fill(~mask, -torch.inf).logsumexp(dim=-1)
            ratio = torch.sigmoid(selected_logits.logsumexp(dim=-1) - rest)
        mixed = ratio[..., None] * o_sparse + (1 - ratio[..., None]) * o_linear
        return self._by_head(mixed), self._by_head(ratio)

    def _by_head(self, x):
        return x.unflatten(0, (BATCH, HEADS))


@pytest.mark.parametrize("ratios", [True, False], ids=["given alpha", "estimated alpha"])
@pytest.mark.parametrize(
    ("tokens", "keys", "count", "head_dim", "query_block"),
    [
        (1, 65, 1, 64, 128),
        (129, 700, 3, 64, 128),
        (300, 127, 1, 128, 128),
        (127, 4200, 60, 32, 128),
        (129, 700, 3, 64, 64),
    ],
)
def test_softmax_and_linear_branch_mixed(generator, tokens, keys, count, head_dim, query_block, ratios):
    loop = Loop(
        generator, tokens=tokens, keys=keys, count=count, head_dim=head_dim, ratios=ratios, query_block=query_block
    )
    (out, ratio), (expected, expected_ratio) = loop.run(), loop.expected()
    assert relative_error(out, expected) < 2e-6
    assert relative_error(ratio, expected_ratio) < 2e-6


@pytest.mark.parametrize(("tokens", "keys"), [(1, 1), (65, 300), (257, 63)])
def test_every_block_selected_is_softmax_attention(generator, tokens, keys):
    loop = Loop(generator, tokens=tokens, keys=keys, count=block_count(keys, 64), linear=False)
    out, ratio = loop.run()
    dense = torch.nn.functional.scaled_dot_product_attention(loop.q.double(), loop.k.double(), loop.v.double())
    assert relative_error(out, dense) < 2e-6
    assert (ratio == 1).all()


def test_half_tiles_compute_what_whole_tiles_do(generator):
    loop = Loop(generator, tokens=300, keys=300, count=2)
    (whole, whole_ratio), (halves, halves_ratio) = loop.run(), loop.run(tile=64)
    assert relative_error(halves, whole) < 1e-6 and torch.equal(halves_ratio, whole_ratio)


@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_the_order_of_the_sums_columns_changes_nothing(generator, head_dim):
    loop = Loop(generator, tokens=130, keys=200, count=2, head_dim=head_dim)
    (out, _), (ordered, _) = loop.run(), loop.run(ordered=True)
    torch.testing.assert_close(ordered, out)


def test_a_group_writes_its_own_heads_only(generator):
    loop = Loop(generator, tokens=130, keys=200, count=2)
    everything, _ = loop.run()
    out, ratio = loop.run(heads=slice(1, 2))
    assert torch.equal(out[:, 1], everything[:, 1])
    assert (out[:, [0, 2]] == 7.0).all() and ratio[:, [0, 2]].isnan().all()


@pytest.mark.parametrize("query_block", [128, 64])
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_every_card_s_tiles_divide_a_query_block(capability, query_block):
    for qk, pv in (("16bit", "16bit"), ("int8", "16bit"), ("int8", "fp8"), ("fp8", "fp8")):
        for element_size in (2, 4):
            for head_dim in (32, 64, 128):
                loop = loop_config(capability, qk, pv, head_dim, element_size, query_block)
                mass = mass_config(capability, element_size, query_block)
                linear = linear_config(capability, element_size)
                walks = backward_config(capability, element_size, element_size, query_block)
                tiles = loop.tile_m, mass.tile_m, linear.tile_m, walks.queries.rows, walks.keys.rows, walks.linear.rows
                assert all(query_block % tile == 0 and tile >= 16 for tile in tiles)
