"""Routers in which some layers have learned ratios and others have none, as a cancelled training leaves them."""

from types import SimpleNamespace

import pytest
import torch

from sla2_kernels import sla2_attention
from sla2_kernels.weights import RouterLayer, RouterWeights, load_router
from sla2_training.ratios import logits_of_estimates, start_logits, with_trained_ratios

HEADS, DIM, LAYERS = 2, 64, 3
LEARNED = torch.tensor([[[2.0, 3.0], [1.0, 1.5]], [[-1.0, 0.5], [0.25, 0.75]]])  # (S, H, A)


def partial(*learned, **facts):
    """A router whose ``learned`` layers have ratios at two sparsities."""
    layers = [RouterLayer(alpha_logits=LEARNED if n in learned else None) for n in range(LAYERS)]
    return RouterWeights(tuple(layers), "wan", HEADS, DIM, sparsities=(0.5, 0.9), **facts)


@pytest.mark.parametrize("learned", [(0,), (1,), (1, 2), (), (0, 1, 2)])
@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.95])
def test_trained_ratios_go_into_a_router_that_has_some(tmp_path, learned, sparsity):
    router, own = partial(*learned), torch.full((HEADS, 1), 0.3)
    logits = [LEARNED[0] + 1 if layer in learned else own for layer in range(LAYERS)]
    with_trained_ratios(router, logits, sparsity, "16bit").save(tmp_path / "router.safetensors")
    made = load_router(tmp_path / "router.safetensors")
    for layer in range(LAYERS):
        torch.testing.assert_close(made.ratio(layer, sparsity), torch.sigmoid(logits[layer]))
        others = {0.5, 0.9} - {sparsity}
        for other in others if layer in learned else ():
            torch.testing.assert_close(made.ratio(layer, other), router.ratio(layer, other))
        # what was trained at one sparsity serves the others, as the nearest one
        for other in others if layer not in learned else ():
            torch.testing.assert_close(made.ratio(layer, other), torch.sigmoid(own))


def test_a_layer_that_nothing_was_trained_in_stays_as_it_was():
    router = partial(0)
    made = with_trained_ratios(router, [LEARNED[0] + 1, None, torch.zeros(HEADS, 1)], 0.7, "16bit")
    assert made.layers[1].alpha_logits is None and made.layers[2].alpha_logits.shape == (3, HEADS, 1)
    kept = with_trained_ratios(router, [None] * LAYERS, 0.7, "16bit")
    torch.testing.assert_close(kept.ratio(0, 0.7), router.ratio(0, 0.7))
    assert kept.layers[1].alpha_logits is None
    none = with_trained_ratios(partial(), [None] * LAYERS, 0.7, "16bit")
    assert all(layer.alpha_logits is None for layer in none.layers)


@pytest.fixture
def attend(pack_module):
    """attend(attention, layer, qkv): one marked call of a LoraAttention."""
    tokens, calls = pack_module("nodes.attention.video_tokens"), pack_module("nodes.attention.model_call")
    read_call = pack_module("nodes.attention.call").read_call

    def run(attention, layer, qkv):
        call = SimpleNamespace(
            read=lambda args, kwargs: (read_call(args, kwargs), tokens.ExactTokens()), repeated=False
        )
        options = {calls.CALL: call, calls.LAYER: layer}
        override = attention._override(None)
        return override(lambda *_, **__: pytest.fail("ran dense"), *qkv, HEADS, transformer_options=options)

    return run


@pytest.mark.parametrize("query_block", [128, 64])
def test_ratios_start_where_they_were_learned_and_else_where_the_calls_estimate_them(
    pack_module, attend, qkv, query_block
):
    router = partial(0, q_block=query_block)
    attention = pack_module("nodes.training.lora_attention").LoraAttention(router, 0.5, "16bit", torch.device("cpu"))
    assert with_trained_ratios(router, attention.trained_logits(), 0.5, "16bit").q_block == query_block
    options = {"sparsity": 0.5, "precision": "16bit", "layout": "BNHD", "query_block": query_block}
    attention.dense = False
    out, _ = attend(attention, 0, qkv), attend(attention, 1, qkv)
    q, k, v = (tensor.unflatten(-1, (HEADS, DIM)) for tensor in qkv)
    wanted = sla2_attention(q, k, v, alpha=torch.sigmoid(LEARNED[0]), **options).flatten(2)
    assert torch.equal(out, wanted)
    _, estimated = sla2_attention(q, k, v, return_alpha=True, **options)
    assert attention.needs_start
    attention.start_ratios()
    assert not attention.needs_start
    first, second, third = attention.trained_logits()
    torch.testing.assert_close(first.detach(), start_logits(partial(0), 0.5)[0])
    torch.testing.assert_close(second.detach(), logits_of_estimates([estimated]))
    # no call of this layer was ever seen: it has no ratio, and goes on estimating one
    assert third is None
    attend(attention, 2, qkv)
    assert attention.trained_logits()[2] is None and not attention._estimates[2]


@pytest.fixture
def qkv():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 300, HEADS * DIM, generator=generator) for _ in range(3)]
