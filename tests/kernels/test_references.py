"""A video and its references in one call: blocks that hold tokens of one stretch, the selection, and the output in float64."""

import functools

import pytest
import torch

from sla2_kernels import reference, sla2_attention
from sla2_kernels.fitted_attention import fitted_attention, sample_rows
from sla2_kernels.references import attend_with_references, select_with_references, selected_with_references
from sla2_kernels.stretches import Stretches, gathered_queries, gathered_rows, whole_output

DIM, HEADS = 32, 2


def drawn(generator, count):
    """Stretches of random ragged lengths, with and without exact tokens around, and the video anywhere among them."""

    def number(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    lengths = [number(1, 400) for _ in range(count)]
    video = number(0, count)
    lengths[video] = number(300, 900)
    ranges, at = [], 0
    for length in lengths:
        at += number(0, 2) * number(1, 100)
        ranges.append((at, at + length))
        at += length
    tokens = at + number(0, 2) * number(1, 100)
    return Stretches(tokens, ranges[video], tuple(ranges[:video] + ranges[video + 1 :]))


def tensors(stretches, generator, dtype=torch.float64):
    return [torch.randn(1, HEADS, stretches.tokens, DIM, generator=generator, dtype=dtype) for _ in range(3)]


def kind_of(stretches):
    """Per token the number of its stretch, or -1 where it is exact."""
    kinds = [-1] * stretches.tokens
    for number, (start, stop) in enumerate(stretches.ordered):
        kinds[start:stop] = [number] * (stop - start)
    return kinds


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_a_block_of_queries_holds_tokens_of_one_stretch_and_every_row_comes_back(generator, count):
    stretches = drawn(generator, count)
    place = torch.arange(stretches.tokens)[:, None]
    gathered = gathered_queries(place, stretches, 0)
    assert gathered.shape[0] == stretches.gathered_rows
    kinds = kind_of(stretches)
    for block, (first, end) in zip(gathered[:, 0].split(128), stretches.query_ranges(), strict=True):
        assert len({kinds[token] for token in block.tolist()} - {-1}) == 1
        assert set(block.tolist()) == set(range(first, end)) and kinds[block[0]] >= 0
    for block, (first, end) in zip(gathered[:, 0].split(64), stretches.query_ranges(64), strict=True):
        assert set(block.tolist()) <= set(range(first, end)) and len({kinds[token] for token in block.tolist()}) == 1
    asked, (before, behind) = [], stretches.room

    def dense(ranges):
        asked.extend(ranges)
        return torch.cat([place[start:stop] for start, stop in ranges])

    out = torch.cat([torch.full((before, 1), -1), gathered, torch.full((behind, 1), -1)])
    assert torch.equal(gathered_rows(out, stretches, 0), gathered)
    assert torch.equal(whole_output(out, dense, stretches, 0), place)
    assert [kinds[token] for start, stop in asked for token in range(start, stop)] == [-1] * kinds.count(-1)
    assert stretches.sparse_rows == stretches.tokens - kinds.count(-1)


@pytest.mark.parametrize("count", [1, 3, 6])
def test_a_routed_block_of_keys_holds_tokens_of_one_stretch(generator, count):
    stretches = drawn(generator, count)
    kinds = kind_of(stretches)
    blocks = [set(kinds[first : first + 64]) for first in range(0, stretches.tokens, 64)]
    video = stretches.ordered.index(stretches.video)
    always, ranges = stretches.key_blocks(2)
    routed = [block for number, block in enumerate(blocks) if not always[number]]
    assert all(len(block) == 1 and block != {-1} for block in routed)
    for first, end in ranges:
        (own,) = {tuple(block) for block in blocks[first:end]}
        assert own != (video,) and end - first > 2 and not any(always[first:end])
    of_the_video = [number for number, block in enumerate(blocks) if block == {video}]
    assert not any(always[number] for number in of_the_video)
    everything, none = stretches.key_blocks(2, exact_references=True)
    assert none == [] and [number for number, forced in enumerate(everything) if not forced] == of_the_video


def expected_selection(q, k, stretches, sparsity, reference_keys, floor, keep_diagonal, query_block):
    """The same choice, row by row in float64."""
    k_smooth = (k - k.mean(dim=2, keepdim=True)).double()
    scores = reference.router_scores(q.double(), k_smooth, query_block=query_block)
    always, ranges = stretches.key_blocks(floor, reference_keys == "exact")
    count = selected_with_references(stretches, sparsity, reference_keys, floor, keep_diagonal)
    found = []
    for head in range(HEADS):
        for row, (begin, end) in enumerate(stretches.query_ranges(query_block)):
            own = range(begin // 64, (end - 1) // 64 + 1) if keep_diagonal else ()
            taken = {number for number, forced in enumerate(always) if forced} | set(own)
            order = scores[0, head, row].argsort(descending=True, stable=True).tolist()
            for first, last in ranges:
                taken |= set([block for block in order if first <= block < last and block not in taken][:floor])
            taken |= set([block for block in order if block not in taken][: count - len(taken)])
            found.append(sorted(taken))
    return torch.tensor(found, dtype=torch.int32).view(1, HEADS, -1, count)


@pytest.mark.parametrize("keep_diagonal", [True, False])
@pytest.mark.parametrize(
    ("reference_keys", "floor", "query_block"),
    [("routed", 2, 128), ("routed", 0, 128), ("exact", 2, 128), ("routed", 2, 64)],
)
def test_the_selection_takes_floors_and_forced_blocks_first(
    generator, reference_keys, floor, query_block, keep_diagonal
):
    stretches = drawn(generator, 4)
    q, k, _ = tensors(stretches, generator)
    q, chosen = gathered_queries(q, stretches, 2), (reference_keys, floor, keep_diagonal, query_block)
    expected = expected_selection(q, k, stretches, 0.8, *chosen)
    options = {"sparsity": 0.8, "reference_keys": reference_keys, "floor": floor, "keep_diagonal": keep_diagonal}
    options["query_block"] = query_block
    assert torch.equal(select_with_references(q, k, None, None, stretches, **options), expected)
    q, k = (t.transpose(1, 2) for t in (q, k))
    assert torch.equal(select_with_references(q, k, None, None, stretches, layout="BNHD", **options), expected)


@pytest.mark.parametrize("layout", ["BHND", "BNHD"])
@pytest.mark.parametrize(("reference_keys", "query_block"), [("routed", 128), ("exact", 128), ("routed", 64)])
def test_the_output_is_the_specifications(generator, reference_keys, query_block, layout):
    stretches = drawn(generator, 5)
    q, k, v = tensors(stretches, generator)
    alpha = torch.rand(HEADS, generator=generator)
    gathered = gathered_queries(q, stretches, 2)
    options = {"sparsity": 0.8, "reference_keys": reference_keys, "keep_diagonal": True, "query_block": query_block}
    blocks = select_with_references(gathered, k, None, None, stretches, **options)
    expected, _ = reference.sla2_reference(gathered, k, v, alpha=alpha, key_blocks=blocks, query_block=query_block)
    given = [t if layout == "BHND" else t.transpose(1, 2) for t in (q, k, v)]
    options["layout"] = layout
    attend = functools.partial(sla2_attention, alpha=alpha, precision="16bit")
    out = attend_with_references(attend, *given, stretches, **options)
    out = out if layout == "BHND" else out.transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


def test_a_fitted_ratio_is_fitted_on_rows_of_all_stretches(generator):
    stretches = drawn(generator, 4)
    q, k, v = tensors(stretches, generator)
    rows = sample_rows(stretches.gathered_rows, 0)
    attend = functools.partial(fitted_attention, rows=rows, fitted=len(rows), precision="16bit")
    found = attend_with_references(attend, q, k, v, stretches, sparsity=0.8)
    gathered = gathered_queries(q, stretches, 2)
    blocks = select_with_references(gathered, k, None, None, stretches, sparsity=0.8)
    ratio, dense = reference.fitted_ratio(gathered, k, v, blocks, rows)
    torch.testing.assert_close(found.ratio.double(), ratio, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.dense.double(), dense, rtol=1e-4, atol=1e-4)


def test_nothing_skipped_is_dense_attention_and_has_its_gradients(generator):
    """Rows that are computed twice are taken once, in the backward pass too."""
    stretches = drawn(generator, 4)
    inputs = tensors(stretches, generator)
    weight = torch.randn(inputs[0].shape, generator=generator, dtype=torch.float64)

    def dense(q, k, v, ranges):
        rows = torch.cat([q[:, :, start:stop] for start, stop in ranges], dim=2)
        return torch.nn.functional.scaled_dot_product_attention(rows, k, v)

    def sparse(q, k, v):
        attend = functools.partial(sla2_attention, precision="16bit")
        out = attend_with_references(attend, q, k, v, stretches, sparsity=0.0, room=stretches.room)
        return whole_output(out, functools.partial(dense, q, k, v), stretches, 2)

    found = []
    for attend in (sparse, torch.nn.functional.scaled_dot_product_attention):
        q, k, v = (t.clone().requires_grad_() for t in inputs)
        out = attend(q, k, v)
        (out * weight).sum().backward()
        found.append((out.detach(), q.grad, k.grad, v.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_torch_compile_sees_one_operator(generator):
    stretches = Stretches(1000, (500, 1000), ((40, 300),))
    q, k, _ = tensors(stretches, generator, torch.float32)
    q = gathered_queries(q, stretches, 2)

    def select(q, k):
        return select_with_references(q, k, None, None, stretches, sparsity=0.5, keep_diagonal=True)

    compiled = torch.compile(select, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q, k), select(q, k))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((100, (50, 120)), "video must name tokens of 0 to 100"),
        ((100, (50, 50)), "video must name tokens"),
        ((100, (50, 100), ((40, 60),)), "must not overlap"),
        ((100, (50, 100), ((0, 20), (19, 30))), "must not overlap"),
        ((100, (50, 100), ((0.5, 20),)), "references must be an integer"),
    ],
)
def test_stretches_that_do_not_fit_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        Stretches(*arguments)


def test_tensors_of_another_sequence_are_refused(generator):
    stretches = Stretches(1000, (500, 1000), ((40, 300),))
    q, k, _ = tensors(stretches, generator)
    with pytest.raises(ValueError, match="the stretches are of 1000 keys and 884 gathered queries, got 1000 and 1000"):
        select_with_references(q, k, None, None, stretches, sparsity=0.5)
    gathered = gathered_queries(q, stretches, 2)
    with pytest.raises(ValueError, match='reference_keys must be "routed" or "exact", got \'all\''):
        select_with_references(gathered, k, None, None, stretches, sparsity=0.5, reference_keys="all")
