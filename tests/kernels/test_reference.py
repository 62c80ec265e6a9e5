"""The float64 definition has the properties that SLA2's equations give it, and equals a formula with dense masks."""

import pytest
import torch
from operator_inputs import attention_inputs, normal, relative_error

from sla2_kernels.reference import phi, sla2_reference, top_k_mask

EXACT = 1e-12


def dense_formula(inputs, sparsity, block_rows):
    """(out, ratio) of one head by N x M masks, block by block in Python: shares no code with the reference."""
    q, k, v = (x[0, 0].double() for x in (inputs.q, inputs.k, inputs.v))
    k = k - k.mean(dim=0)
    scale = q.shape[1] ** -0.5
    q_blocks, k_blocks = q.split(block_rows), k.split(64)
    keep = max(1, int((1 - sparsity) * len(k_blocks) + 1e-6))
    unselected = torch.ones(len(q), len(k), dtype=torch.bool)
    rest = torch.zeros(len(q), dtype=torch.float64)
    for i, q_block in enumerate(q_blocks):
        rows = slice(block_rows * i, block_rows * i + len(q_block))
        pooled = inputs.proj_q.double() @ q_block.mean(dim=0)
        scores = [float(pooled @ (inputs.proj_k.double() @ block.mean(dim=0))) for block in k_blocks]
        best = sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:keep]
        for j, block in enumerate(k_blocks):
            if j in best:
                unselected[rows, 64 * j : 64 * j + len(block)] = False
            else:
                rest[rows] += len(block) * torch.exp(q_block @ block.mean(dim=0) * scale)
    weights = torch.exp(q @ k.T * scale).masked_fill(unselected, 0.0)
    linear = (phi(q) @ phi(k).T).masked_fill(~unselected, 0.0)
    ratio = weights.sum(dim=1) / (weights.sum(dim=1) + rest)
    if inputs.alpha is not None:
        ratio = torch.full_like(ratio, inputs.alpha.item())
    o_sparse = weights @ v / weights.sum(dim=1, keepdim=True)
    o_linear = linear @ v / linear.sum(dim=1, keepdim=True)
    return ratio[:, None] * o_sparse + (1 - ratio[:, None]) * o_linear, ratio


@pytest.mark.parametrize("knots", [None, 0])
@pytest.mark.parametrize(
    ("tokens", "keys", "query_block"), [(1, 65, 128), (129, 300, 128), (300, 129, 128), (129, 300, 64)]
)
def test_equals_a_formula_with_dense_masks(generator, tokens, keys, query_block, knots):
    inputs = attention_inputs(generator, heads=1, tokens=tokens, keys=keys, head_dim=16, proj="shared", knots=knots)
    out, ratio = sla2_reference(*inputs.tensors(), sparsity=0.5, query_block=query_block)
    expected, expected_ratio = dense_formula(inputs, 0.5, query_block)
    assert relative_error(out[0, 0], expected) < EXACT and relative_error(ratio[0, 0], expected_ratio) < 1e-7


@pytest.mark.parametrize("knots", [None, 0, 3])
def test_sparsity_0_is_softmax_attention(generator, knots):
    inputs = attention_inputs(generator, batch=2, tokens=150, keys=200, knots=knots)
    out, ratio = sla2_reference(*inputs.tensors(), sparsity=0.0)
    dense = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in inputs.tensors()[:3]))
    assert relative_error(out, dense) < EXACT and (ratio == 1).all()


def test_alpha_1_and_0_leave_one_branch(generator):
    inputs = attention_inputs(generator, heads=1, tokens=130, keys=200)
    mixed = sla2_reference(*inputs.tensors()[:3], alpha=torch.tensor([0.25]), sparsity=0.5)[0]
    sparse, linear = (
        sla2_reference(*inputs.tensors()[:3], alpha=torch.tensor([float(share)]), sparsity=0.5)[0] for share in (1, 0)
    )
    assert relative_error(mixed, 0.25 * sparse + 0.75 * linear) < EXACT
    # doubling q sharpens softmax attention; the linear branch sees q only through phi
    shifted = sla2_reference(inputs.q + 3, *inputs.tensors()[1:3], alpha=torch.zeros(1), key_blocks=BLOCKS)[0]
    unshifted = sla2_reference(*inputs.tensors()[:3], alpha=torch.zeros(1), key_blocks=BLOCKS)[0]
    assert relative_error(shifted, unshifted) < 1e-6


BLOCKS = torch.tensor([[0, 2], [1, 3]]).view(1, 1, 2, 2)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.97])
def test_every_output_is_an_average_of_values(generator, sparsity):
    inputs = attention_inputs(generator, batch=2, tokens=150, keys=300, knots=None)
    out, ratio = sla2_reference(*inputs.tensors(), sparsity=sparsity)
    v = inputs.v.double()
    assert (out <= v.amax(dim=2, keepdim=True) + 1e-9).all() and (out >= v.amin(dim=2, keepdim=True) - 1e-9).all()
    assert ((ratio > 0) & (ratio <= 1)).all()
    affine, _ = sla2_reference(inputs.q, inputs.k, v * 3 - 5, sparsity=sparsity)
    assert relative_error(affine, out * 3 - 5) < EXACT


def test_heads_and_batch_entries_do_not_meet(generator):
    inputs = attention_inputs(generator, batch=2, heads=3, tokens=130, keys=200, proj="per head", knots=2)
    out, ratio = sla2_reference(*inputs.tensors(), sparsity=0.5)
    heads, batch = torch.tensor([2, 0, 1]), torch.tensor([1, 0])
    mixed = [x[batch][:, heads] for x in inputs.tensors()[:3]] + [x[heads] for x in inputs.tensors()[3:]]
    permuted, permuted_ratio = sla2_reference(*mixed, sparsity=0.5)
    assert relative_error(permuted, out[batch][:, heads]) < EXACT
    assert relative_error(permuted_ratio, ratio[batch][:, heads]) < EXACT


def test_order_inside_a_key_block_and_an_offset_of_all_keys_do_not_matter(generator):
    inputs = attention_inputs(generator, tokens=130, keys=300, knots=None)
    out, _ = sla2_reference(*inputs.tensors(), sparsity=0.5)
    order = torch.cat([block[torch.randperm(len(block), generator=generator)] for block in torch.arange(300).split(64)])
    shuffled, _ = sla2_reference(
        inputs.q, inputs.k[:, :, order].double() + normal(generator, 64), inputs.v[:, :, order], sparsity=0.5
    )
    assert relative_error(shuffled, out) < 1e-10


def test_estimated_alpha_is_the_selected_mass_where_a_block_s_keys_are_equal(generator):
    inputs = attention_inputs(generator, heads=1, tokens=130, keys=256, knots=None)
    inputs.k = inputs.k[:, :, ::64].repeat_interleave(64, dim=2)
    _, ratio = sla2_reference(inputs.q, inputs.k, inputs.v, key_blocks=BLOCKS)
    weights = (inputs.q.double() @ inputs.k.double().transpose(-1, -2) / 8).softmax(dim=-1).unflatten(-1, (4, 64))
    mass = weights.sum(dim=-1)
    selected = torch.cat([mass[:, :, :128, BLOCKS[0, 0, 0]], mass[:, :, 128:, BLOCKS[0, 0, 1]]], dim=2).sum(dim=-1)
    assert relative_error(ratio, selected) < EXACT


def test_chosen_query_blocks_are_rows_of_the_whole(generator):
    inputs = attention_inputs(generator, tokens=300, knots=3)
    out, ratio = sla2_reference(*inputs.tensors(), sparsity=0.5)
    part, part_ratio = sla2_reference(*inputs.tensors(), sparsity=0.5, query_blocks=[2, 0])
    rows = torch.cat([torch.arange(256, 300), torch.arange(128)])
    assert torch.equal(part, out[:, :, rows]) and torch.equal(part_ratio, ratio[:, :, rows])


def test_equal_scores_select_the_lowest_index():
    scores = torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0])
    assert top_k_mask(scores, 2).tolist() == [False, True, True, False, False]
    assert top_k_mask(scores, 4).tolist() == [True, True, True, False, True]
