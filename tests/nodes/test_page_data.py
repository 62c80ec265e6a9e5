"""What the nodes send to the page: routing maps and loss curves."""

import pytest
import torch


def test_a_map_is_the_share_of_heads_that_pick_a_block(pack_module):
    maps = pack_module("nodes.runs.routing_maps")
    # two heads, two query blocks, two of four key blocks each
    picked = torch.tensor([[[[0, 1], [2, 3]], [[0, 2], [2, 3]]]], dtype=torch.int32)
    shares = maps.pick_shares(picked, 4)
    assert shares.tolist() == [[1.0, 0.5, 0.5, 0.0], [0.0, 0.0, 1.0, 1.0]]


def test_a_large_map_is_shrunk_to_means_and_keeps_its_share(pack_module):
    maps = pack_module("nodes.runs.routing_maps")
    share = torch.rand(600, 1200, generator=torch.Generator().manual_seed(1))
    small = maps.shrunk(share)
    assert small.shape == (maps.SIZE, maps.SIZE)
    assert abs(small.mean() - share.mean()) < 0.01


def looked_at(pack_module, q, k, **weights):
    """What a sparse call hands to its maps, after the layer: tensors of (B, L, H, D), no learned weights."""
    call, layer_weights = pack_module("nodes.attention.sparse_call"), pack_module("nodes.attention.layer_weights")
    return call.VideoPart(q, k, k, k, "BNHD"), layer_weights.CallWeights(**weights), 0.5, "int8"


def test_five_steps_of_a_run_are_seen_once_per_layer_and_become_one_picture(pack_module, tmp_path):
    maps = pack_module("nodes.runs.routing_maps").RoutingMaps()
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(1, 300, 2, 64, generator=generator) for _ in range(2))
    steps = torch.linspace(1, 0, 21)
    for step in range(20):
        sigmas = steps[step : step + 1].clone()
        maps.begin_step(sigmas, steps)
        maps.grid = (3, 10, 10)
        for layer in (0, 2):
            maps.see(layer, *looked_at(pack_module, q, k))
            maps.see(layer, *looked_at(pack_module, k, q))
    maps.close()
    assert maps.steps == [0, 5, 10, 14, 19] and maps.layers == [0, 2]
    first = maps.shares[0, 0]
    assert first.shape == (3, 5) and torch.allclose(first.sum(dim=1), torch.full((3,), 2.0))
    page = maps.for_page(tmp_path)
    assert maps.atlas().shape == (2 * 3, 5 * 5) and (tmp_path / page["file"]["filename"]).is_file()
    assert page["frames"] == 3 and page["tokens"] == 300 and page["tile"] == [5, 3]
    assert maps.for_page(tmp_path)["file"] == page["file"], "one file per run"
    # comfy-cli lists every dict with a filename that a node's output holds as a result, in the order of execution
    assert "filename" not in page


@pytest.mark.parametrize(("keep", "size"), [(False, 128), (True, 128), (True, 64)])
def test_a_map_shows_the_blocks_that_keep_diagonal_forces(pack_module, keep, size):
    """Keys that their own queries would never pick; a query block of 128 tokens covers two key blocks of 64, one of 64 one."""
    maps = pack_module("nodes.runs.routing_maps").RoutingMaps()
    q = torch.eye(4, 64).repeat_interleave(128, 0)[None, :, None].repeat(1, 1, 2, 1)
    steps = torch.linspace(1, 0, 2)
    maps.begin_step(steps[:1], steps)
    maps.see(0, *looked_at(pack_module, q, -q, keep_diagonal=keep, query_block=size))
    maps.close()
    own = torch.eye(512 // size).repeat_interleave(size // 64, 1)
    assert torch.equal(maps.shares[0, 0] * own, own if keep else torch.zeros(own.shape))
    assert torch.equal(maps.shares[0, 0].sum(dim=1), torch.full((512 // size,), 4.0))


def test_without_a_sampler_that_says_its_steps_there_is_no_map(pack_module, tmp_path):
    maps = pack_module("nodes.runs.routing_maps").RoutingMaps()
    q = torch.randn(1, 300, 2, 64)
    maps.begin_step(None, None)
    maps.see(0, *looked_at(pack_module, q, q))
    maps.close()
    assert maps.for_page(tmp_path) is None and list(tmp_path.iterdir()) == []


def test_nothing_is_mapped_where_no_prompt_runs(pack_module):
    assert pack_module("nodes.runs.routing_maps").wanted_maps() is None


def test_loss_curves_are_thinned_and_bounded_by_the_layers(pack_module):
    curves = pack_module("nodes.training.loss_curves").loss_curves({0: [1.0] * 500, 1: [3.0] * 500, 2: []})
    assert curves["steps"] == 500 and len(curves["at"]) == 120 and curves["at"][0] == 1 and curves["at"][-1] == 500
    assert set(curves["low"]) == {1.0} and set(curves["high"]) == {3.0} and set(curves["mean"]) == {2.0}


def test_loss_curves_before_the_first_step_are_empty(pack_module):
    curves = pack_module("nodes.training.loss_curves").loss_curves({})
    assert curves == {"steps": 0, "at": [], "mean": [], "low": [], "high": []}
