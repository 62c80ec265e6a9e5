"""The miniature's routers and LoRA: the script that trains a router, live and on kept captures, and the files that are shipped."""

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import explore_router
from miniature import train_router
from miniature.train_dit import DIT_FILE
from miniature.weight_files import WEIGHTS, weight_file
from sla2_kernels import load_router

LAYERS = 9
SHIPPED = weight_file("wan_miniature_router.safetensors")
LORA, LORA_ROUTER = (weight_file(f"wan_miniature_stage2_{part}.safetensors") for part in ("lora", "router"))


def test_live_training_writes_a_router_and_its_errors(tmp_path, capsys):
    out = tmp_path / "router.safetensors"
    train_router.main(["--tiny", "--sparsities", "0.6,0.4", "--out", str(out), "--device", "cpu"])
    router = load_router(out)
    router.require_model(model_family="wan", num_layers=2, num_heads=1, head_dim=128)
    assert router.sparsities == (0.6, 0.4)
    assert not torch.equal(router.layers[1].proj_q[0], torch.eye(128))
    assert "skips 60%" in capsys.readouterr().out


def test_captures_are_kept_explored_and_trained_on(tmp_path, capsys):
    tiny = ["--tiny", "--device", "cpu", "--videos", "1", "--held-out", "1", "--keep", "2", "--query-blocks", "2"]
    studies = ["--studies", "ratios", "--steps", "2", "--sparsities", "0.6", "--frozen"]
    explore_router.main([*tiny, *studies, "--keep-captures", str(tmp_path)])
    first = capsys.readouterr().out
    explore_router.main(["--captures", str(tmp_path), "--device", "cpu", "--query-blocks", "2", *studies])
    assert capsys.readouterr().out == first
    assert "best per row (bound)" in first
    out = tmp_path / "router.safetensors"
    train_router.main(["--captures", str(tmp_path), "--steps", "2", "--sparsities", "0.6", "--out", str(out)])
    load_router(out).require_model(model_family="wan", num_layers=2, num_heads=1, head_dim=128)


@pytest.mark.skipif(not SHIPPED.exists(), reason="the Registry's archive leaves the weights out")
def test_the_shipped_router_is_the_miniatures_and_was_trained():
    router = load_router(SHIPPED)
    router.require_model(model_family="wan", num_layers=LAYERS, num_heads=2, head_dim=128)
    assert router.sparsities == (0.99, 0.97, 0.95, 0.9)
    for index, layer in enumerate(router.layers):
        assert not torch.equal(layer.proj_q, torch.eye(128).expand_as(layer.proj_q))
        ratio = router.ratio(index, 0.97)
        assert ((ratio > 0) & (ratio < 1)).all()


@pytest.mark.skipif(not LORA.exists(), reason="the Registry's archive leaves the weights out")
def test_the_router_of_the_shipped_lora_fits_the_miniature():
    router = load_router(LORA_ROUTER)
    router.require_model(model_family="wan", num_layers=LAYERS, num_heads=2, head_dim=128)
    assert all(((ratio := router.ratio(layer, 0.97)) > 0).all() and (ratio < 1).all() for layer in range(LAYERS))


@pytest.mark.skipif(not LORA.exists(), reason="the Registry's archive leaves the weights out")
@pytest.mark.parametrize("file", ["stage2_lora", "4_steps_lora", "8_steps_lora"])
def test_a_shipped_lora_is_one_of_the_shipped_transformer(file):
    model, lora = load_file(weight_file(DIT_FILE)), load_file(weight_file(f"wan_miniature_{file}.safetensors"))
    down = {name.removesuffix(".lora_down.weight"): tensor for name, tensor in lora.items() if "lora_down" in name}
    assert len(down) == 10 * LAYERS, "all linear layers of the blocks"
    for name, tensor in down.items():
        weight = model[f"{name.removeprefix('diffusion_model.')}.weight"]
        change = lora[f"{name}.lora_up.weight"].float() @ tensor.float()
        assert change.shape == weight.shape and 0 < change.norm() < weight.float().norm(), name


@pytest.mark.skipif(not LORA.exists(), reason="the Registry's archive leaves the weights out")
def test_all_weights_together_are_a_small_clone():
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*.*")) <= 60_000_000
