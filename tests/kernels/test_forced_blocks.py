"""Forced key blocks beside the router's choice: which blocks, how many, and that they change nothing else."""

import functools

import pytest
import torch

from sla2_kernels import operators, select_key_blocks, sla2_attention
from sla2_kernels.exact_ends import attend_video
from sla2_kernels.forced_blocks import forced_block_counts, select_with_forced_blocks, selected_with_forced
from sla2_kernels.video_attention import video_attention


def tensors(queries=300, keys=640, dim=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 2, n, dim, generator=generator) for n in (queries, keys, keys)]


@pytest.mark.parametrize(
    ("tokens", "front", "back", "counts"),
    [
        (640, 0, 0, (0, 10, 0)),
        (640, 1, 0, (1, 9, 0)),
        (640, 64, 64, (1, 8, 1)),
        (640, 65, 65, (2, 6, 2)),
        (650, 0, 5, (0, 10, 1)),
        (650, 0, 11, (0, 9, 2)),
        (100, 40, 40, (2, 0, 0)),
        (64, 64, 0, (1, 0, 0)),
    ],
)
def test_blocks_with_one_exact_token_are_forced(tokens, front, back, counts):
    assert forced_block_counts(tokens, front, back) == counts


@pytest.mark.parametrize(("front", "back"), [(-1, 0), (0, -1), (500, 200)])
def test_more_exact_tokens_than_tokens_are_refused(front, back):
    q, k, _ = tensors()
    with pytest.raises(ValueError, match="front and back must be"):
        select_with_forced_blocks(q, k, sparsity=0.5, front=front, back=back)


@pytest.mark.parametrize("layout", ["BHND", "BNHD"])
def test_the_choice_among_free_blocks_is_the_routers_own(layout):
    q, k, _ = tensors()
    picked = select_with_forced_blocks(
        *(t if layout == "BHND" else t.transpose(1, 2) for t in (q, k)), sparsity=0.5, front=70, back=30, layout=layout
    )
    # 10 key blocks: 2 forced in front, 1 at the end, 7 free of which floor(0.5 * 7) = 3 are kept
    assert picked.shape == (1, 2, 3, 6) and picked.dtype == torch.int32
    assert selected_with_forced(640, 0.5, 70, 30) == 6
    assert (picked[..., :2] == torch.tensor([0, 1])).all() and (picked[..., 5] == 9).all()
    alone = select_key_blocks(q, k[:, :, 128:576], sparsity=0.5) + 2
    assert torch.equal(picked[..., 2:5], alone)


def test_without_exact_tokens_it_is_the_routers_choice():
    q, k, _ = tensors(keys=601)
    proj = torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
    ours = select_with_forced_blocks(q, k, proj, proj.T, sparsity=0.7)
    assert torch.equal(ours, select_key_blocks(q, k, proj, proj.T, sparsity=0.7))


@pytest.mark.parametrize(("front", "back"), [(40, 0), (0, 40), (600, 40)])
def test_sparsity_0_and_all_forced_select_every_block(front, back):
    q, k, v = tensors()
    sparsity = 0.9 if front == 600 else 0.0
    blocks = select_with_forced_blocks(q, k, sparsity=sparsity, front=front, back=back)
    assert blocks.shape[-1] == 10
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(
        sla2_attention(q, k, v, precision="16bit", key_blocks=blocks), dense, rtol=1e-4, atol=1e-5
    )


def test_torch_compile_sees_one_operator():
    q, k, _ = tensors()

    def select(q, k):
        return select_with_forced_blocks(q, k, sparsity=0.5, front=70)

    compiled = torch.compile(select, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q, k), select(q, k))
    torch.library.opcheck(
        torch.ops.sla2.select_with_forced_blocks,
        (q, k, None, None, 0.5, 70, 3, True, "torch"),
        test_utils="test_faketensor",
    )


@pytest.mark.parametrize("keep_diagonal", [True, False])
@pytest.mark.parametrize(("front", "back"), [(0, 40), (64, 0), (70, 30), (560, 40)])
@pytest.mark.parametrize("sparsity", [0.4, 0.9])
def test_the_operator_takes_them_in_its_own_selection(sparsity, front, back, keep_diagonal):
    """Also where an own block and one at the end are more than a row keeps of its free ones: then they are selected apart."""
    q, k, v = tensors(queries=640 - front - back if keep_diagonal else 300)
    routing = {"sparsity": sparsity, "keep_diagonal": keep_diagonal}
    blocks = select_with_forced_blocks(q, k, front=front, back=back, **routing)
    expected = sla2_attention(q, k, v, precision="16bit", key_blocks=blocks)
    found = attend_video(
        functools.partial(sla2_attention, precision="16bit"), q, k, v, key_prefix=front, key_suffix=back, **routing
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("method", ["sla2", "top-k only"])
def test_our_own_selection_is_taken_as_it_is(monkeypatch, method):
    """It ascends and holds no block twice: sorting and clamping it again, in every call, changes nothing."""
    q, _, _ = tensors(keys=300)
    options = {"front": 70, "back": 33, "sparsity": 0.5, "precision": "16bit", "method": method}
    expected = video_attention(q, q, q, **options)
    monkeypatch.setattr(operators, "distinct_blocks", lambda *_: pytest.fail("sorted again"))
    assert torch.equal(video_attention(q, q, q, **options), expected)
    with pytest.raises(ValueError, match="twice"):
        sla2_attention(q, q, q, key_blocks=torch.zeros(1, 2, 3, 2, dtype=torch.int32))
