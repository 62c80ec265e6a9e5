"""Attention over a sequence that is split among processes: each process computes a share of the heads over all tokens.

Heads are independent, so two all-to-all exchanges are enough, and the result is that of a single process.
Source: DeepSpeed-Ulysses, arXiv 2309.14509.
"""

import torch
import torch.distributed as dist

from .arguments import check_inputs


def sequence_parallel_attention(q, k, v, attend, group=None):
    """Self-attention of tokens that P processes hold in equal parts, in the order of their ranks; differentiable.

    Args:
        q, k, v: (B, N / P, H, D), this process's tokens with all heads: one shape, dtype and device.
        attend: called as attend(q, k, v, heads) with views (B, N, H / P, D) and the slice of the heads that they are;
            returns their output (B, N, H / P, D).
        group: process group; None is all processes.

    Returns:
        (B, N / P, H, D): the output of this process's tokens.

    Raises:
        ValueError: q, k and v differ in shape, dtype or device, or P does not divide H.
    """
    check_inputs("BNHD", q=q, k=k, v=v)
    if q.shape != k.shape:
        raise ValueError(f"q, k and v must have one shape, got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}.")
    processes, rank = dist.get_world_size(group), dist.get_rank(group)
    batch, tokens, heads, head_dim = q.shape
    if heads % processes:
        raise ValueError(
            f"{processes} processes cannot share {heads} heads equally: use a number that divides {heads}."
        )
    share = heads // processes
    # token before batch: the received parts then form one sequence, and q, k and v are views of it
    sent = q.new_empty(processes, tokens, batch, 3, share, head_dim)
    for place, x in enumerate((q, k, v)):
        sent[:, :, :, place] = x.unflatten(2, (processes, share)).permute(2, 1, 0, 3, 4)
    whole = _Exchange.apply(sent, group).flatten(0, 1).transpose(0, 1)
    out = attend(*whole.unbind(2), slice(rank * share, (rank + 1) * share))
    back = _Exchange.apply(out.transpose(0, 1).contiguous(), group).unflatten(0, (processes, tokens))
    return back.permute(2, 1, 0, 3, 4).flatten(2, 3)


class _Exchange(torch.autograd.Function):
    """The p-th equal part of dimension 0 goes to process p, whose part for this process comes in its place."""

    @staticmethod
    def forward(ctx, sent, group):
        ctx.group = group
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        return received

    @staticmethod
    def backward(ctx, grad):
        # the exchange is its own inverse
        return _Exchange.apply(grad.contiguous(), ctx.group), None
