"""A smaller LoRA adds what the larger one does but for its least singular values."""

import pytest
import torch
from safetensors.torch import load_file

from miniature import shrink_lora
from miniature.lora import save_lora


def factors(*sizes):
    """{name: tensor} of layers (out, in, rank) whose products have the singular values 1, 1/2, 1/4, ..."""
    torch.manual_seed(0)
    lora = {}
    for number, (rows, columns, rank) in enumerate(sizes):
        up, down = (torch.linalg.qr(torch.randn(size, rank))[0] for size in (rows, columns))
        lora[f"diffusion_model.{number}.lora_up.weight"] = up * 0.5 ** torch.arange(rank)
        lora[f"diffusion_model.{number}.lora_down.weight"] = down.T
    return lora


def product(lora, number):
    name = f"diffusion_model.{number}.lora_"
    return lora[f"{name}up.weight"].double() @ lora[f"{name}down.weight"].double()


def test_the_least_values_go_wherever_they_are():
    lora = factors((20, 30, 8), (20, 30, 3))
    smaller, share = shrink_lora.shrink(lora, 2 * 50 * (3 + 3))
    assert [len(smaller[f"diffusion_model.{number}.lora_down.weight"]) for number in (0, 1)] == [3, 3]
    torch.testing.assert_close(product(smaller, 1), product(lora, 1), rtol=1e-5, atol=1e-6)
    assert torch.linalg.svdvals(product(lora, 0) - product(smaller, 0))[0].item() == pytest.approx(0.5**3, rel=1e-5)
    left = sum(0.25**place for place in range(3, 8))
    everything = sum(0.25**place for place in range(8)) + sum(0.25**place for place in range(3))
    assert share == pytest.approx((left / everything) ** 0.5, rel=1e-5)


def test_a_file_keeps_its_form(tmp_path, capsys):
    lora = factors((20, 30, 8), (40, 10, 8))
    save_lora(tmp_path / "large.safetensors", lora, torch.bfloat16, "what it is")
    words = [str(tmp_path / "large.safetensors"), "--out", str(tmp_path / "small.safetensors"), "--megabytes", "0.0012"]
    shrink_lora.main(words)
    found = load_file(tmp_path / "small.safetensors")
    assert set(found) == set(load_file(tmp_path / "large.safetensors"))
    for number in (0, 1):
        rank = len(found[f"diffusion_model.{number}.lora_down.weight"])
        assert found[f"diffusion_model.{number}.alpha"] == rank < 8
        gap = torch.linalg.matrix_norm(product(found, number) - product(lora, number))
        assert 0 < gap < 1.2 * 0.5**rank + 0.01
    assert "% left out" in capsys.readouterr().out


def test_too_few_bytes_are_told():
    with pytest.raises(ValueError, match="hold no value of each layer"):
        shrink_lora.shrink(factors((20, 30, 8)), 99)
