"""SoftTop-k: a differentiable stand-in for the router's top-k (SLA2, arXiv 2602.12675, stage 1; Ding et al. 2024)."""

import math

import torch

TAU = 0.1


def _row_shift(logits, count):
    """The lambda of every row for which sigmoid(logits + lambda) sums to ``count``, by bisection; 0 < count < T_n."""
    at_equal_scores = math.log(count / (logits.shape[-1] - count))
    low = at_equal_scores - logits.amax(dim=-1, keepdim=True)
    high = at_equal_scores - logits.amin(dim=-1, keepdim=True)
    for _ in range(60 if logits.dtype == torch.float64 else 36):
        middle = (low + high) / 2
        too_many = torch.sigmoid(logits + middle).sum(dim=-1, keepdim=True) > count
        low, high = torch.where(too_many, low, middle), torch.where(too_many, middle, high)
    return (low + high) / 2


class _SoftTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, count, tau):
        logits = scores / tau
        mask = torch.sigmoid(logits + _row_shift(logits, count))
        ctx.save_for_backward(mask)
        ctx.tau = tau
        return mask

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        """The row sum is constant, so d lambda = -sum(s dx) / sum(s) with s = mask (1 - mask)."""
        (mask,) = ctx.saved_tensors
        slope = mask * (1 - mask)
        # every entry saturated: the row cannot move, and 0 / 0 must not say otherwise
        total = slope.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(slope.dtype).tiny)
        return slope * (grad - (slope * grad).sum(dim=-1, keepdim=True) / total) / ctx.tau, None, None


def soft_top_k(scores, count, tau=TAU):
    """M = sigmoid(P / tau + lambda_i), lambda_i such that every row sums to ``count``.

    The gradient includes lambda's dependence on the scores (implicit differentiation of the row sum).

    Args:
        scores: (..., T_n) router logits, float32 or float64.
        count: selected blocks per row, 1 to T_n; T_n gives a mask of ones.
        tau: temperature; the smaller, the closer to the hard top-k.

    Raises:
        ValueError: count outside 1 to T_n, or tau not above 0.
    """
    if not 1 <= count <= scores.shape[-1]:
        raise ValueError(f"count must be from 1 to the {scores.shape[-1]} key blocks of a row, got {count}.")
    if not tau > 0:
        raise ValueError(f"tau must be above 0, got {tau}.")
    if count == scores.shape[-1]:
        return torch.ones_like(scores)
    return _SoftTopK.apply(scores, count, tau)
