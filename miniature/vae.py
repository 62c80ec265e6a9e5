"""The Wan2.1 video VAE at small width: 8x8 pixels and 4 frames become one latent of 16 channels.

State-dict keys and results are those ComfyUI expects of a Wan2.1 VAE. ComfyUI walks a video in chunks of frames with a
cache per convolution; here the whole video passes at once, which gives the same numbers (tests/miniature) because every
convolution is causal and the first frame never meets a temporal resampling. Activations are (B, T, H, W, C).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

Z_CHANNELS = 16
WIDTHS = (1, 2, 4, 4)
# ComfyUI's fixed normalisation of Wan2.1 latents (comfy/latent_formats.py, class Wan21).
LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


def normalise_latents(latents: torch.Tensor) -> torch.Tensor:
    """VAE latents (B, 16, T, h, w) -> the scale the transformer works on."""
    mean, std = _latent_statistics(latents)
    return (latents - mean) / std


def denormalise_latents(latents: torch.Tensor) -> torch.Tensor:
    """The inverse of normalise_latents."""
    mean, std = _latent_statistics(latents)
    return latents * std + mean


def _latent_statistics(like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(like.new_tensor(values).view(1, -1, 1, 1, 1) for values in (LATENT_MEAN, LATENT_STD))


def rms_silu(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """SiLU of the channel-normalised x (..., C), scaled by gamma (C,); float32 inside."""
    return F.silu(rms(x, gamma).float()).to(x.dtype)


def rms(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """x / |x| * sqrt(C) * gamma over the last dimension."""
    y = F.normalize(x.float(), dim=-1) * (x.shape[-1] ** 0.5 * gamma)
    return y.to(x.dtype)


class Kernels:
    """How the two costly steps run; train.py swaps in faster ones on a GPU. Results agree up to rounding."""

    norm: Callable = staticmethod(rms_silu)
    stack_frames = False  # a (3, 3, 3) convolution as a 2-D one over three stacked frames


class Norm(nn.Module):
    """Scale of a channel norm; its shape is part of the file format."""

    def __init__(self, dim: int, spatial_dims: int = 3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * spatial_dims))


class NormSilu(Norm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Kernels.norm(x, self.gamma.flatten())


class CausalConv(nn.Conv3d):
    """3-D convolution, same-padded in space, padded only with the past in time (none of either for kernel size 1)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        depth, side = self.kernel_size[0], self.kernel_size[1]
        if depth == side == 1:
            return F.linear(x, self.weight.flatten(1), self.bias)
        x = F.pad(x, (0, 0, 0, 0, 0, 0, depth - 1, 0))
        frames = x.shape[1] - depth + 1
        if side == 1:
            return _temporal(x, [slice(i, i + frames) for i in range(depth)], self)
        if not Kernels.stack_frames:
            out = F.conv3d(x.permute(0, 4, 1, 2, 3), self.weight, self.bias, padding=(0, side // 2, side // 2))
            return out.permute(0, 2, 3, 4, 1)
        stacked = torch.cat([x[:, i : i + frames] for i in range(depth)], -1)
        weight = self.weight.transpose(1, 2).flatten(1, 2)
        return _conv2d(stacked, weight, self.bias, padding=side // 2)


def _temporal(x: torch.Tensor, windows: list[slice], conv: nn.Conv3d) -> torch.Tensor:
    """A convolution over time alone: one matrix product on the stacked frames."""
    stacked = torch.cat([x[:, window] for window in windows], -1)
    return F.linear(stacked, conv.weight.transpose(1, 2).flatten(1), conv.bias)


def _conv2d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, **options) -> torch.Tensor:
    """A 2-D convolution of every frame of x (B, T, H, W, C)."""
    frames = x.flatten(0, 1).permute(0, 3, 1, 2)
    out = F.conv2d(frames, weight.contiguous(memory_format=torch.channels_last), bias, **options)
    return out.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


class ResidualBlock(nn.Module):
    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        # Identities hold the places of the activation and dropout in the file format's numbering.
        self.residual = nn.Sequential(
            NormSilu(in_dim), nn.Identity(), CausalConv(in_dim, out_dim, 3),
            NormSilu(out_dim), nn.Identity(), nn.Identity(), CausalConv(out_dim, out_dim, 3),
        )  # fmt: skip
        self.shortcut = CausalConv(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.residual(x) + self.shortcut(x)


class FrameAttention(nn.Module):
    """Single-head attention among the positions of one frame."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = Norm(dim, 2)
        self.to_qkv, self.proj = nn.Conv2d(dim, dim * 3, 1), nn.Conv2d(dim, dim, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, h, w, c = x.shape
        y = rms(x, self.norm.gamma.flatten())
        y = F.linear(y, self.to_qkv.weight.flatten(1), self.to_qkv.bias)
        q, k, v = y.reshape(b * t, 1, h * w, 3 * c).chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v).reshape(b, t, h, w, c)
        return x + F.linear(y, self.proj.weight.flatten(1), self.proj.bias)


class Downsample(nn.Module):
    """Half the height and width; with `temporal` also one frame from two, except the first, which stays alone."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(dim, dim, 3, stride=2))
        if temporal:
            self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        conv = self.resample[1]
        x = _conv2d(F.pad(x, (0, 0, 0, 1, 0, 1)), conv.weight, conv.bias, stride=2)
        if not hasattr(self, "time_conv") or x.shape[1] == 1:
            return x
        later = _temporal(x, [slice(0, -2, 2), slice(1, -1, 2), slice(2, None, 2)], self.time_conv)
        return torch.cat([x[:, :1], later], 1)


class Upsample(nn.Module):
    """Twice the height and width; with `temporal` also two frames from one, except the first, which stays alone."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(dim, dim // 2, 3, padding=1))
        if temporal:
            self.time_conv = CausalConv(dim, dim * 2, (3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, h, w, c = x.shape
        if hasattr(self, "time_conv") and t > 1:
            later = self.time_conv(x[:, 1:]).unflatten(-1, (2, c)).permute(0, 1, 4, 2, 3, 5).flatten(1, 2)
            x = torch.cat([x[:, :1], later], 1)
        x = x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2, -1).reshape(b, -1, 2 * h, 2 * w, c)
        conv = self.resample[1]
        return _conv2d(x, conv.weight, conv.bias, padding=1)


def _middle(dim: int) -> nn.Sequential:
    return nn.Sequential(ResidualBlock(dim, dim), FrameAttention(dim), ResidualBlock(dim, dim))


def _head(dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(NormSilu(dim), nn.Identity(), CausalConv(dim, out_dim, 3))


class Encoder(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        dims = [dim, *(dim * m for m in WIDTHS)]
        self.conv1 = CausalConv(3, dim, 3)
        layers: list[nn.Module] = []
        for i, (in_dim, out_dim) in enumerate(itertools.pairwise(dims)):
            layers += [ResidualBlock(in_dim, out_dim), ResidualBlock(out_dim, out_dim)]
            if i < 3:
                layers.append(Downsample(out_dim, temporal=i > 0))
        self.downsamples = nn.Sequential(*layers)
        self.middle = _middle(dims[-1])
        self.head = _head(dims[-1], 2 * Z_CHANNELS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.middle(self.downsamples(self.conv1(x))))


class Decoder(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        dims = [dim * m for m in (WIDTHS[-1], *WIDTHS[::-1])]
        self.conv1 = CausalConv(Z_CHANNELS, dims[0], 3)
        self.middle = _middle(dims[0])
        layers: list[nn.Module] = []
        for i, (in_dim, out_dim) in enumerate(itertools.pairwise(dims)):
            first = in_dim // 2 if i else in_dim
            layers += [ResidualBlock(first, out_dim), ResidualBlock(out_dim, out_dim), ResidualBlock(out_dim, out_dim)]
            if i < 3:
                layers.append(Upsample(out_dim, temporal=i < 2))
        self.upsamples = nn.Sequential(*layers)
        self.head = _head(dims[-1], 3)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.head(self.upsamples(self.middle(self.conv1(z))))


class WanVAE(nn.Module):
    """Wan2.1 VAE of base width `dim` (the released one has 96)."""

    def __init__(self, dim: int = 16):
        super().__init__()
        self.dim = dim
        self.encoder, self.decoder = Encoder(dim), Decoder(dim)
        self.conv1 = CausalConv(2 * Z_CHANNELS, 2 * Z_CHANNELS, 1)
        self.conv2 = CausalConv(Z_CHANNELS, Z_CHANNELS, 1)
        with torch.no_grad():  # Training begins with little noise on the latents, or nothing gets through.
            self.conv1.weight[Z_CHANNELS:] *= 0.1
            self.conv1.bias[Z_CHANNELS:] = -6.0

    @classmethod
    def from_state_dict(cls, state: dict[str, torch.Tensor]) -> WanVAE:
        """A VAE of the width and weights of a checkpoint, in float32."""
        vae = cls(state["decoder.head.0.gamma"].shape[0])
        vae.load_state_dict(state)
        return vae

    def posterior(self, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean, log variance) of the latents, each (B, 16, 1 + (F - 1) / 4, H / 8, W / 8).

        Args:
            video: (B, 3, F, H, W) in [-1, 1]; F is 1 plus a multiple of 4, H and W multiples of 8.
        """
        frames, height, width = video.shape[2:]
        if frames % 4 != 1 or height % 8 or width % 8:
            raise ValueError(f"video is {frames} frames of {height}x{width}: use 4n+1 frames and sides divisible by 8")
        out = self.conv1(self.encoder(video.permute(0, 2, 3, 4, 1).contiguous()))
        mean, log_variance = out.permute(0, 4, 1, 2, 3).chunk(2, 1)
        return mean, log_variance.clamp(-30, 20)

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """Mean latents of the video, as ComfyUI's VAE encodes (before normalisation)."""
        return self.posterior(video)[0]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, 16, T, h, w) -> (B, 3, 4T - 3, 8h, 8w), about [-1, 1], not clamped."""
        out = self.decoder(self.conv2(latents.permute(0, 2, 3, 4, 1)))
        return out.permute(0, 4, 1, 2, 3)

    @torch.no_grad()
    def fold_statistics(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Change the weights so that latents of these statistics, (16,) each, get Wan2.1's; videos stay the same.

        The last encoder step and the first decoder step act on single positions, so an affine map per channel folds
        into them exactly.
        """
        target_mean, target_std = (mean.new_tensor(values) for values in (LATENT_MEAN, LATENT_STD))
        gain = target_std / std
        shift = target_mean - gain * mean
        weight, bias = self.conv1.weight[:Z_CHANNELS], self.conv1.bias[:Z_CHANNELS]
        weight.mul_(gain.view(-1, 1, 1, 1, 1))
        bias.mul_(gain).add_(shift)
        self.conv1.bias[Z_CHANNELS:] += 2 * gain.log()  # the log variances of the same latents
        weight, bias = self.conv2.weight, self.conv2.bias
        weight.div_(gain.view(1, -1, 1, 1, 1))
        bias.sub_(weight.flatten(1) @ shift)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two videos in [-1, 1]; both are clamped first, as a player would."""
    error = (a.clamp(-1, 1).double() - b.clamp(-1, 1).double()).square().mean().item()
    return 10 * math.log10(4.0 / max(error, 1e-12))
