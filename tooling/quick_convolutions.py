"""3D convolutions on a CPU by oneDNN, for the demo's VAE: four times as fast as what PyTorch chooses for one small video
(findings/torch_conv3d_ignores_the_width.sh). All else stays PyTorch's."""

import torch
from torch.nn import functional


def take_onednn():
    """From now on conv3d() of this process takes oneDNN for float32 on a CPU, where nothing is differentiated."""
    if not torch.backends.mkldnn.is_available():
        return
    plain = functional.conv3d

    def conv3d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        ours = input.device.type == "cpu" and input.dtype == weight.dtype == torch.float32 and input.ndim == 5
        if not ours or isinstance(padding, str) or torch.is_grad_enabled():
            return plain(input, weight, bias, stride, padding, dilation, groups)
        sizes = (_three(padding), _three(stride), _three(dilation))
        return torch.ops.aten.mkldnn_convolution(input, weight, bias, *sizes, groups)

    functional.conv3d = conv3d


def _three(size):
    return [size] * 3 if isinstance(size, int) else list(size)
