"""Processes that share the heads of a sequence compute what one does: the operator with its gradients, diffusers' Wan."""

import pytest
import torch

pytest.importorskip("diffusers.models")

import ulysses_processes as case
from diffusers import ContextParallelConfig
from process_scripts import run_script

from sla2_diffusers import apply_sla2
from sla2_kernels import select_key_blocks
from sla2_kernels.sequence_parallel import sequence_parallel_attention

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ulysses")
    run_script(case.__file__, folder, CUDA_VISIBLE_DEVICES="")
    return folder


@pytest.fixture(params=[2, 4], ids=["2 processes", "4 processes"])
def found(request, folder):
    return torch.load(folder / f"{request.param}.pt")


@pytest.mark.parametrize("groups", [1, 2, 100], ids=["one group", "two groups", "a head each"])
def test_operator_and_gradients_equal_one_process(found, groups):
    whole = case.qkv(300, torch.float64)
    expected = case.output_and_gradients(*whole, lambda q, k, v: case.attend(q, k, v, slice(None)))
    mine = found["gradients", groups]
    assert torch.equal(mine[0], expected[0])
    for gradient, one in zip(mine[1:], expected[1:], strict=True):
        torch.testing.assert_close(gradient, one, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", case.LENGTHS)
def test_an_exchange_as_it_is_changes_no_bit(found, tokens, dtype):
    q, k, v, _ = case.qkv(tokens, dtype)
    assert torch.equal(found["16bit", tokens, dtype], case.attend(q, k, v, slice(None)))


@pytest.mark.parametrize("query_block", case.QUERY_BLOCKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", case.LENGTHS)
def test_an_exchange_in_8_bit_selects_what_one_process_does(found, tokens, dtype, query_block):
    q, k, v, _ = case.qkv(tokens, dtype)
    out, selected = found["8bit", tokens, dtype, query_block]
    options = {"sparsity": case.SPARSITY, "layout": "BNHD", "query_block": query_block}
    assert torch.equal(selected, select_key_blocks(q, k, *case.projections(), **options))
    exact = case.attend(q, k, v, slice(None), query_block=query_block).float()
    of_one = case.attend_int8(q, k, v, slice(None), query_block=query_block)
    error, error_of_one = ((x.float() - exact).norm() / exact.norm() for x in (out, of_one))
    assert 0.005 < error < 1.1 * error_of_one < 0.05


def test_what_is_not_finite_stays_so_in_8_bit(found):
    finite = found["broken"]
    assert finite.shape == (2, 300, case.HEADS)
    finite = finite.bool()
    assert not finite[0, -1, 2] and finite.sum() == finite.numel() - 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"head_groups": 0}, "head_groups must be at least 1, got 0"),
        ({"head_groups": ()}, r"head_groups must be at least 1, got \(\)"),
        ({"head_groups": (1, 0)}, r"head_groups must be at least 1, got \(1, 0\)"),
        ({"head_groups": (1, 0.5)}, "head_groups must be an integer, got 0.5"),
        ({"routing": case.routing()}, "an exchange in 8 bit has no gradients"),
    ],
)
def test_what_cannot_be_exchanged_is_told_before_anything_is(options, told):
    q, k, v, _ = case.qkv(300, torch.float32)
    with pytest.raises(ValueError, match=told):
        sequence_parallel_attention(q.requires_grad_(), k, v, case.attend, **options)


@pytest.mark.parametrize("way", case.WAYS)
def test_diffusers_wan_equals_one_process(found, way):
    video, counts, error = found[way]
    model = case.transformer()
    without = case.video(model)
    handle = case.applied(model, way)
    expected = case.video(model)
    assert counts == (case.LAYERS, 0, handle.sparsity)
    if way == "untrained":
        # of the heads of the first process
        assert error == pytest.approx(handle.attention_error, rel=0.2)
    else:
        assert error is None
    apart = (video - expected).norm()
    if way.startswith("8 bit"):
        assert (without - expected).norm() > 10 * apart > 0
    else:
        torch.testing.assert_close(video, expected, rtol=1e-4, atol=1e-5)
        assert (without - expected).norm() > 100 * apart


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (ContextParallelConfig(ring_degree=2), "context parallelism is not plain Ulysses"),
        (ContextParallelConfig(ulysses_degree=3), "3 devices cannot share 8 heads equally"),
    ],
    ids=["ring", "odd"],
)
def test_other_ways_to_split_run_dense_and_say_why(config, reason):
    class Split:
        context_parallel_config = config

    model = case.transformer()
    handle = apply_sla2(model, case.router(), sparsity=0.75)
    for block in model.blocks:
        # the reason alone: dense attention without processes does not look at this
        block.attn1.processor.dense = Unsplit(block.attn1.processor.dense)
        block.attn1.processor._parallel_config = Split()
    case.video(model)
    assert handle.sparse_calls == 0
    assert all(sentence.startswith(reason) for sentence in handle.dense_reasons())


class Unsplit:
    """A dense processor that runs in one process whatever it is told."""

    def __init__(self, dense):
        self.dense, self._parallel_config = dense, None

    def __call__(self, *args, **kwargs):
        return self.dense(*args, **kwargs)
