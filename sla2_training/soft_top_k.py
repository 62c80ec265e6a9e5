"""SoftTop-k: a differentiable stand-in for the router's top-k (SLA2, arXiv 2602.12675, stage 1; Ding et al. 2024)."""

import torch

TAU = 0.1
SECTIONS = 16  # of the bracket, tried side by side: a quarter of the launches of a bisection


def _row_shift(logits, counts):
    """The lambda of every row for which sigmoid(logits + lambda) sums to its count: (..., 1, T_n), (S, 1) -> (..., S, 1)."""
    width = logits.shape[-1]
    largest, smallest = logits.amax(dim=-1, keepdim=True), logits.amin(dim=-1, keepdim=True)
    low = torch.log(counts / (width - counts)) - largest
    rounds = range(1, (15 if logits.dtype == torch.float64 else 9) + 1)
    digits = [[digit * SECTIONS**-n for digit in range(1, SECTIONS)] for n in rounds]
    steps = (largest - smallest)[..., None] * torch.tensor(digits, dtype=logits.dtype, device=logits.device)
    for n in range(len(digits)):
        shifts = low + steps[..., n, :]
        sums = (logits[..., None, :] + shifts[..., None]).sigmoid_().sum(dim=-1)
        low = shifts.where(sums <= counts, low).amax(dim=-1, keepdim=True)
    return low


class _SoftTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, counts, tau):
        logits = scores[..., None, :] / tau
        counts = torch.tensor(counts, dtype=scores.dtype, device=scores.device)[:, None]
        mask = torch.sigmoid(logits + _row_shift(logits, counts))
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
        moved = slope * (grad - (slope * grad).sum(dim=-1, keepdim=True) / total)
        return moved.sum(dim=-2) / ctx.tau, None, None


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
    return soft_top_k_masks(scores, (count,), tau)[..., 0, :]


def soft_top_k_masks(scores, counts, tau=TAU):
    """soft_top_k() for several counts at once: (..., T_n) -> (..., S, T_n). Takes 15 times the masks' memory on its way."""
    for count in counts:
        if not 1 <= count <= scores.shape[-1]:
            raise ValueError(f"count must be from 1 to the {scores.shape[-1]} key blocks of a row, got {count}.")
    if not tau > 0:
        raise ValueError(f"tau must be above 0, got {tau}.")
    # a row that keeps everything is shifted by infinity: ones, of no gradient
    return _SoftTopK.apply(scores, tuple(counts), tau)
