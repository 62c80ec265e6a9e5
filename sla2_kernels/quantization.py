"""Low-bit number formats of the sparse branch, emulated in torch (the scheme of SageAttention2++, as SLA2 Alg. 2 uses it).

Each function rounds a tensor to what the low-bit kernels see and returns it dequantised, with the straight-through
gradient: the backward pass treats the rounding as the identity.
"""

import torch

INT8_MAX = 127.0
FP8_MAX = 448.0
BALANCE_ROWS = 256  # sampled for balance()
MIN_SPREAD = 2.0**-16  # of the largest channel's: a channel that is zero in the sample may not be outside of it
P_SCALE = 256.0  # P = exp(S - rowmax) lies in [0, 1]; times 256 it uses e4m3's range up to 448 without saturating


def _straight_through(x, rounded):
    return x + (rounded - x).detach()


def fake_int8(x, dims):
    """x rounded to INT8 with one scale per block; ``dims`` are the dimensions that a block spans."""
    scale = x.detach().abs().amax(dim=dims, keepdim=True).clamp_min(1e-20) / INT8_MAX
    return _straight_through(x, (x / scale).round() * scale)


@torch.no_grad()
def balance(q, k):
    """What K's channels are multiplied with, and Q's divided by, before INT8 rounds them, (D,); no logit changes.

    The root of a channel's spread in Q over that in K, about its mean, in BALANCE_ROWS rows. q: (N, D); k: (M, D). One channel far larger
    than the others would take their precision: a block has one scale.
    """

    def sampled(x):
        return x[torch.arange(BALANCE_ROWS, device=x.device) * x.shape[0] // BALANCE_ROWS]

    # NaN and infinity in a row of Q affect its own block only; in K they affect the whole head anyway
    spreads = sampled(q).nan_to_num(0.0, 0.0, 0.0).square().mean(dim=0), sampled(k).var(dim=0, correction=0)
    spread_q, spread_k = (spread.maximum(spread.amax() * MIN_SPREAD) for spread in spreads)
    factor = (spread_q / spread_k) ** 0.25
    # where a sample is all zeros or not finite
    return factor.where((factor > 0) & (factor < torch.inf), 1.0)


def fake_fp8(x, dims):
    """x rounded to FP8 e4m3 with one scale per block; ``dims`` are the dimensions that a block spans."""
    scale = x.detach().abs().amax(dim=dims, keepdim=True).clamp_min(1e-20) / FP8_MAX
    return _straight_through(x, (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale)


def fake_fp8_exponent(x, dims):
    """x rounded to FP8 e4m3 after division by a power of two per block (how the kernels store V)."""
    largest = x.detach().abs().amax(dim=dims, keepdim=True).clamp_min(1e-20)
    scale = torch.exp2((largest / FP8_MAX).log2().ceil())
    return _straight_through(x, (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale)


def fake_fp8_probabilities(p):
    """Softmax numerators in [0, 1] rounded to FP8 e4m3, scaled by 256."""
    return _straight_through(p, (p * P_SCALE).to(torch.float8_e4m3fn).to(p.dtype) / P_SCALE)
