"""The demo's convolutions on a CPU equal PyTorch's, by another operator."""

import pytest
import torch
from torch.nn import functional

from tooling.quick_convolutions import take_onednn

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@pytest.fixture
def convolve(monkeypatch):
    monkeypatch.setattr(functional, "conv3d", functional.conv3d)  # put back afterwards
    take_onednn()
    return functional.conv3d


def operators(call):
    with torch.profiler.profile() as profile:
        found = call()
    return found, {event.key for event in profile.key_averages()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": 1},
        {"padding": (0, 1, 1), "stride": (1, 2, 2)},
        {"dilation": 2, "padding": 2, "groups": 4},
    ],
)
@pytest.mark.parametrize("biased", [True, False])
def test_a_small_video_is_convolved_by_onednn(convolve, options, biased):
    video, bias = torch.randn(1, 8, 5, 12, 20), torch.randn(16) if biased else None
    kernel = torch.randn(16, 8 // options.get("groups", 1), 3, 3, 3)
    with torch.no_grad():
        found, names = operators(lambda: convolve(video, kernel, bias, **options))
    expected = torch.conv3d(video, kernel, bias, **options)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert "aten::mkldnn_convolution" in names and "aten::slow_conv3d" not in names


def test_a_modules_convolution_takes_it_too(convolve):
    layer, video = torch.nn.Conv3d(4, 4, 3), torch.randn(1, 4, 4, 6, 6)
    with torch.inference_mode():
        found, names = operators(lambda: layer(video))
    assert "aten::mkldnn_convolution" in names
    torch.testing.assert_close(found, torch.conv3d(video, layer.weight, layer.bias), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["gradients", "float64", "padding in words", "no batch"])
def test_all_else_stays_pytorchs(convolve, case):
    dtype = torch.float64 if case == "float64" else torch.float32
    video = torch.randn(1, 4, 4, 6, 6, dtype=dtype)
    video = video[0] if case == "no batch" else video.requires_grad_(case == "gradients")
    kernel = torch.randn(4, 4, 3, 3, 3, dtype=dtype)
    padding = "same" if case == "padding in words" else 1
    with torch.set_grad_enabled(case == "gradients"):
        found, names = operators(lambda: convolve(video, kernel, padding=padding))
    assert "aten::slow_conv3d" in names and found.requires_grad == (case == "gradients")
    assert torch.equal(found, torch.conv3d(video, kernel, padding=padding))
