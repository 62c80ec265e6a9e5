"""What a run keeps on the device: one copy per layer, however many sparsities its schedule has."""

import pytest
import torch

from sla2_kernels.sla_v1 import SLAWeights
from sla2_kernels.weights import RouterLayer, RouterWeights

HEADS, DIM = 2, 8
CPU = torch.device("cpu")
SPARSITIES = [0.8 + 0.01 * step for step in range(18)]


def router(**facts):
    generator = torch.Generator().manual_seed(0)
    proj_q, proj_k = (torch.randn(HEADS, DIM, DIM, generator=generator) for _ in range(2))
    logits = torch.randn(2, HEADS, 3, generator=generator)
    return RouterWeights((RouterLayer(proj_q, proj_k, logits),), "wan", HEADS, DIM, sparsities=(0.8, 0.97), **facts)


def bytes_of(tensors):
    """Of all tensors that are not None; memory that several share counts once."""
    storages = [x.untyped_storage() for x in tensors if x is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.fixture
def placed(pack_module):
    """placed(router, sla_weights, **settings): CallWeights of layer 0 at each of SPARSITIES."""

    def place(router=None, sla_weights=None, **settings):
        make = pack_module("nodes.settings.values").AttentionSettings
        weights = pack_module("nodes.attention.layer_weights").LayerWeights(
            make(**settings), router, HEADS, sla_weights
        )
        return [weights.on_device(0, CPU, sparsity) for sparsity in SPARSITIES]

    return place


def test_projections_are_kept_once_and_ratios_follow_the_sparsity(placed):
    given = router()
    found = placed(given)
    once = bytes_of([given.layers[0].proj_q, given.layers[0].proj_k])
    assert bytes_of(x for weights in found for x in (weights.proj_q, weights.proj_k)) == once
    for weights, sparsity in zip(found, SPARSITIES, strict=True):
        assert torch.equal(weights.proj_q, given.layers[0].proj_q)
        assert torch.equal(weights.ratio, given.ratio(0, sparsity))


def test_weights_of_sla_v1_are_kept_once(placed):
    layer = torch.randn(DIM, DIM), torch.randn(DIM)
    found = placed(sla_weights=SLAWeights((layer,)))
    assert bytes_of(x for weights in found for x in weights.proj_l) == bytes_of(layer)
    assert all(map(torch.equal, found[0].proj_l, layer)) and not found[0].linear_branch


def test_a_fixed_ratio_of_1_computes_no_linear_branch(placed):
    weights = placed(router(), ratio_mode="fixed", fixed_ratio=1.0)[0]
    assert not weights.linear_branch and weights.ratio is None


@pytest.mark.parametrize(
    ("given", "settings", "expected"),
    [
        (None, {}, 64),
        (None, {"ratio_mode": "estimated"}, 64),
        (None, {"method": "top-k only"}, 128),
        (router(), {}, 128),
        (router(q_block=64), {}, 64),
        (router(q_block=64), {"ratio_mode": "fitted"}, 64),
    ],
    ids=["untrained", "estimated", "top-k only", "trained at 128", "trained at 64", "trained at 64, fitted"],
)
def test_query_tokens_per_selection_are_the_router_s_or_else_go_by_the_card(
    pack_module, monkeypatch, placed, given, settings, expected
):
    monkeypatch.setattr(pack_module("nodes.attention.layer_weights"), "default_query_block", lambda q, precision: 64)
    assert placed(given, **settings)[0].query_block_of(torch.empty(DIM), "int8") == expected
