"""sla2_diffusers on a tiny random Wan transformer of diffusers, on the CPU."""

import pytest
import torch

pytest.importorskip("diffusers.models")  # this folder alone would pass for the package

from diffusers import WanTransformer3DModel

from sla2_diffusers import SLA2WanProcessor, apply_sla2
from sla2_kernels import sla2_attention
from sla2_kernels.reference import sla2_reference
from sla2_kernels.weights import RouterLayer, RouterWeights, identity_router

LAYERS, HEADS, HEAD_DIM = 2, 2, 32
SHAPE = (1, 16, 3, 24, 22)  # 3 x 12 x 11 = 396 tokens: ragged last blocks


@pytest.fixture
def transformer():
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, text_dim=32, freq_dim=32, ffn_dim=64, num_layers=LAYERS
    )
    return model.eval()


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(SHAPE, generator=generator),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 8, 32, generator=generator),
        "return_dict": False,
    }


@torch.no_grad()
def run(model, inputs):
    return model(**inputs)[0]


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def router(**changes):
    eye = torch.eye(HEAD_DIM)
    layer = RouterLayer(eye + 0.05, eye - 0.05, torch.full((1, HEADS, 1), 1.0))
    facts = {"model_family": "wan", "num_heads": HEADS, "head_dim": HEAD_DIM, "sparsities": (0.75,)} | changes
    return RouterWeights((layer,) * LAYERS, **facts)


def test_sparsity_0_at_16_bit_equals_dense_to_rounding(transformer, inputs):
    dense = run(transformer, inputs)
    handle = apply_sla2(transformer, sparsity=0.0, precision="16bit")
    assert relative_error(run(transformer, inputs), dense) < 1e-5
    assert (handle.sparse_calls, handle.dense_calls, handle.sparsity) == (LAYERS, 0, 0.0)


def test_fused_projections_are_strided_views_of_one_tensor(transformer, inputs):
    dense = run(transformer, inputs)
    for block in transformer.blocks:
        block.attn1.fuse_projections()
    apply_sla2(transformer, sparsity=0.0, precision="16bit")
    assert relative_error(run(transformer, inputs), dense) < 1e-5


def test_undo_restores_bitwise_and_twice(transformer, inputs):
    dense = run(transformer, inputs)
    before = [block.attn1.processor for block in transformer.blocks]
    handle = apply_sla2(transformer, sparsity=0.75)
    assert not torch.equal(run(transformer, inputs), dense)
    handle.undo()
    handle.undo()
    assert [block.attn1.processor for block in transformer.blocks] == before
    assert torch.equal(run(transformer, inputs), dense)


def test_undo_leaves_a_later_processor_alone(transformer):
    handle = apply_sla2(transformer)
    later = object.__new__(SLA2WanProcessor)
    transformer.blocks[0].attn1.set_processor(later)
    handle.undo()
    assert transformer.blocks[0].attn1.processor is later
    assert not isinstance(transformer.blocks[1].attn1.processor, SLA2WanProcessor)


@pytest.mark.parametrize("trained_with", [None, True, False])
def test_own_blocks_are_kept_untrained_or_where_the_router_was_trained_so(
    transformer, inputs, monkeypatch, trained_with
):
    kept = []

    def spy(*tensors, keep_diagonal, **options):
        kept.append(keep_diagonal)
        return sla2_attention(*tensors, keep_diagonal=keep_diagonal, **options)

    monkeypatch.setattr("sla2_diffusers.sla2_attention", spy)
    weights = None if trained_with is None else router(keep_diagonal=trained_with)
    apply_sla2(transformer, weights, sparsity=0.75, precision="16bit")
    run(transformer, inputs)
    assert kept == [trained_with is not False] * LAYERS


def test_cross_attention_is_untouched(transformer, inputs):
    before = [block.attn2.processor for block in transformer.blocks]
    handle = apply_sla2(transformer, sparsity=0.75)
    run(transformer, inputs)
    assert [block.attn2.processor for block in transformer.blocks] == before
    assert handle.sparse_calls == LAYERS


def test_the_operator_gets_views_and_the_routers_weights(transformer, inputs, monkeypatch):
    seen = []

    def spy(q, k, v, proj_q, proj_k, alpha, **options):
        seen.append((q, k, v, proj_q, proj_k, alpha, options))
        return sla2_attention(q, k, v, proj_q, proj_k, alpha, **options)

    monkeypatch.setattr("sla2_diffusers.sla2_attention", spy)
    weights = router()
    handle = apply_sla2(transformer, weights, sparsity=0.75, precision="16bit")
    run(transformer, inputs)
    q, k, v, proj_q, proj_k, alpha, options = seen[1]
    assert q.shape == k.shape == v.shape == (1, 396, HEADS, HEAD_DIM)
    assert v._is_view() and options["layout"] == "BNHD"
    assert torch.equal(proj_q, weights.layers[1].proj_q) and torch.equal(proj_k, weights.layers[1].proj_k)
    assert torch.equal(alpha, weights.ratio(1, 0.75))
    # one key block of 64 kept of 396 tokens
    assert handle.sparsity == pytest.approx(1 - 64 / 396)


def test_output_is_that_of_the_reference_in_every_layer(transformer, inputs, monkeypatch):
    def in_float64(q, k, v, proj_q, proj_k, alpha, *, sparsity, layout, **_):
        wide = [t.transpose(1, 2).double() for t in (q, k, v)]
        weights = [None if t is None else t.double() for t in (proj_q, proj_k, alpha)]
        return sla2_reference(*wide, *weights, sparsity=sparsity)[0].transpose(1, 2).to(q.dtype)

    handle = apply_sla2(transformer, router(), sparsity=0.75, precision="16bit")
    found = run(transformer, inputs)
    monkeypatch.setattr("sla2_diffusers.sla2_attention", in_float64)
    assert relative_error(found, run(transformer, inputs)) < 1e-4
    assert handle.sparse_calls == 2 * LAYERS


def test_identity_router_is_no_router(transformer, inputs):
    handle = apply_sla2(transformer, sparsity=0.75)
    without = run(transformer, inputs)
    handle.undo()
    apply_sla2(transformer, identity_router("wan", LAYERS, HEADS, HEAD_DIM), sparsity=0.75)
    assert torch.equal(run(transformer, inputs), without)


def test_dense_calls_are_counted_with_their_reason(transformer, inputs):
    dense = run(transformer, inputs)
    handle = apply_sla2(transformer, sparsity=0.75, minimum_tokens=397, dense_layers=[-1])
    assert torch.equal(run(transformer, inputs), dense)
    assert handle.dense_reasons() == {
        "the sequence has 396 tokens, minimum_tokens is 397": 1,
        "dense_layers keeps this layer dense": 1,
    }
    assert "0 of 2 self-attention calls ran sparse" in handle.summary()
    handle.reset()
    assert (handle.sparse_calls, handle.dense_calls, handle.sparsity) == (0, 0, None)


def test_an_explicit_backend_that_cannot_run_is_dense_and_says_so(transformer, inputs, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dense = run(transformer, inputs)
    handle = apply_sla2(transformer, sparsity=0.75, backend="triton")
    assert torch.equal(run(transformer, inputs), dense)
    (reason,) = handle.dense_reasons()
    assert "NVIDIA GPU" in reason


def test_a_mask_is_honoured_by_running_dense(transformer, inputs):
    attention = transformer.blocks[0].attn1
    x = torch.randn(1, 130, HEADS * HEAD_DIM)
    mask = torch.zeros(1, 1, 130, 130).masked_fill(torch.ones(130, 130).triu(1).bool(), float("-inf"))
    with torch.no_grad():
        expected = attention(x, attention_mask=mask)
        handle = apply_sla2(transformer, sparsity=0.5)
        assert torch.equal(attention(x, attention_mask=mask), expected)
    assert handle.dense_reasons() == {"the call has an attention mask": 1}


def test_gradients_reach_the_projections(transformer, inputs):
    apply_sla2(transformer, sparsity=0.5, precision="16bit")
    transformer(**inputs)[0].square().mean().backward()
    for block in transformer.blocks:
        for linear in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v):
            assert linear.weight.grad.abs().sum() > 0 and torch.isfinite(linear.weight.grad).all()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_heads": 3}, "number of heads"),
        ({"model_family": "ltx"}, "model family"),
    ],
)
def test_a_router_of_another_model_is_refused(transformer, changes, sentence):
    layer = RouterLayer(torch.eye(HEAD_DIM), None, None)
    facts = {"model_family": "wan", "num_heads": HEADS, "head_dim": HEAD_DIM} | changes
    with pytest.raises(ValueError, match=sentence):
        apply_sla2(transformer, RouterWeights((layer,) * LAYERS, **facts))
    assert not any(isinstance(block.attn1.processor, SLA2WanProcessor) for block in transformer.blocks)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"sparsity": 1.0}, "sparsity must be"),
        ({"precision": "4bit"}, "precision must be"),
        ({"backend": "cuda"}, "backend must be"),
        ({"dense_layers": [2]}, "names layer 2"),
    ],
)
def test_bad_settings_are_one_sentence(transformer, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        apply_sla2(transformer, **options)


def test_applying_twice_and_to_another_model_is_refused(transformer):
    apply_sla2(transformer)
    with pytest.raises(ValueError, match="applied to this transformer already"):
        apply_sla2(transformer)
    with pytest.raises(TypeError, match="WanTransformer3DModel"):
        apply_sla2(torch.nn.Linear(2, 2))
