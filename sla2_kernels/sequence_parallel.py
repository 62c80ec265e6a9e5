"""Attention over a sequence that is split among processes: each process computes a share of the heads over all tokens.

Heads are independent, so two all-to-all exchanges are enough, and the result is that of a single process.
Source: DeepSpeed-Ulysses, arXiv 2309.14509.

The heads of a process can be exchanged and computed in groups: while one group is computed, the next ones arrive and the
output of those before it leaves. Where the processes' GPUs can read each other's memory, copies take the place of the
collectives (peer_copies.py).
"""

import torch
import torch.distributed as dist

from .arguments import check_inputs, check_projections, checked_count
from .eight_bit_exchange import EightBitExchange
from .peer_copies import CannotCopy, attention_by_copies, peers_for

TRANSFERS = ("auto", "collective", "copies")


def sequence_parallel_attention(q, k, v, attend, group=None, *, head_groups=1, routing=None, transfer="auto"):
    """Self-attention of tokens that P processes hold in equal parts, in the order of their ranks; differentiable.

    Args:
        q, k, v: (B, N / P, H, D), this process's tokens with all heads: one shape, dtype and device.
        attend: called for each group of heads as attend(q, k, v, heads) with views (B, N, G, D) and the slice of the heads
            that they are; returns their output (B, N, G, D). Groups follow each other, together they are H / P heads.
        group: process group; None is all processes.
        head_groups: number of equal groups, at most H / P of which are made; or the relative sizes of groups, such as (1, 3, 1):
            only the first one's arrival and the last one's return have no attention beside them.
        routing: None exchanges q, k and v as they are. A PoolRouting, the same on all processes, exchanges them in 8 bit
            (eight_bit_exchange.py), half the bytes of 16 bit, and block means in float32; attend is then called as
            attend(q, k, v, heads, key_blocks) with the RoutedBlocks that these means select, which are those of the
            tensors before the exchange. The output always returns in q's dtype.
        transfer: "collective" is torch's all_to_all_single. "copies" are made by the copy engines of GPUs of one host that can
            read each other's memory, without gradients or a routing; each GPU keeps a buffer for them, (P - 1) / P of the
            bytes of q, k, v and the output. "auto" copies where that is possible, and logs once where the GPUs cannot.

    Returns:
        (B, N / P, H, D): the output of this process's tokens.

    Raises:
        ValueError: q, k and v differ in shape, dtype or device, P does not divide H, head_groups is below 1, attend returns
            another shape, a projection of the routing does not fit, transfer is unknown, or gradients are asked for with a
            routing or, by grad mode being on, with copies: these have none.
        CannotCopy: a RuntimeError; transfer is "copies", and the processes cannot.
    """
    check_inputs("BNHD", q=q, k=k, v=v)
    if q.shape != k.shape:
        raise ValueError(f"q, k and v must have one shape, got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}.")
    if isinstance(head_groups, (tuple, list)):
        sizes = [checked_count("head_groups", size) for size in head_groups]
    else:
        sizes = [1] * min(checked_count("head_groups", head_groups), q.shape[2])
    if not sizes or min(sizes) < 1:
        raise ValueError(f"head_groups must be at least 1, got {head_groups}.")
    if routing is not None and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError("an exchange in 8 bit has no gradients: leave routing out, or run under torch.no_grad().")
    if transfer not in TRANSFERS:
        raise ValueError(f'transfer must be "auto", "collective" or "copies", got {transfer!r}.')
    if transfer == "copies" and (routing is not None or torch.is_grad_enabled()):
        raise ValueError('transfer "copies" has neither a routing nor gradients: run under torch.no_grad().')
    if routing is not None:
        check_projections(routing.proj_q, routing.proj_k, q, "BNHD")
    processes, rank = dist.get_world_size(group), dist.get_rank(group)
    if q.shape[2] % processes:
        raise ValueError(
            f"{processes} processes cannot share {q.shape[2]} heads equally: use a number that divides {q.shape[2]}."
        )
    share = q.shape[2] // processes
    parts = _parts(share, sizes)
    # torch.compile cannot trace the exception that says why not
    may_copy = transfer == "copies" or (transfer == "auto" and not torch.compiler.is_compiling())
    # attend() may have weights with gradients
    if may_copy and routing is None and not torch.is_grad_enabled():
        try:
            peers = peers_for(q, group, parts)
        except CannotCopy:
            if transfer == "copies":
                raise
        else:
            return attention_by_copies(q, k, v, attend, parts, peers)
    if routing is None:
        exchange = WholeExchange(q, k, v, processes)
    else:
        exchange = EightBitExchange(q, k, v, processes, rank, routing)
    overlaps = len(parts) > 1
    # all of them are under way before the first is waited for
    arriving = [_Transfer(exchange.message(part), group, overlaps) for part in parts]
    leaving = []
    for part in parts:
        heads = slice(rank * share + part.start, rank * share + part.stop)
        arguments = exchange.opened(arriving.pop(0).wait(), heads)
        out = attend(*arguments)
        if out.shape != arguments[0].shape:
            raise ValueError(f"attend() must return its q's shape {tuple(arguments[0].shape)}, got {tuple(out.shape)}.")
        leaving.append(_Transfer(out.transpose(0, 1).contiguous().unflatten(0, (processes, -1)), group, overlaps))
    # (P, N / P, B, G, D) each
    returned = [transfer.wait().permute(2, 1, 0, 3, 4) for transfer in leaving]
    return torch.cat(returned, dim=3).flatten(2, 3)


def _parts(count, sizes):
    """Slices of 0 to count - 1 of these relative sizes, as near as can be, none empty."""
    ends = [count * sum(sizes[:place]) // sum(sizes) for place in range(len(sizes) + 1)]
    return [slice(begin, end) for begin, end in zip(ends[:-1], ends[1:], strict=True) if begin < end]


class WholeExchange:
    """Messages that hold q, k and v as they are."""

    def __init__(self, q, k, v, processes):
        self._parts = [x.unflatten(2, (processes, -1)) for x in (q, k, v)]

    def message(self, part):
        """What goes to each process, (P, N / P, B, 3, G, D): of its heads those in the slice ``part``."""
        batch, tokens, processes, _, head_dim = self._parts[0].shape
        # token before batch: the received parts then form one sequence, and q, k and v are views of it
        sent = self._parts[0].new_empty(processes, tokens, batch, 3, part.stop - part.start, head_dim)
        for place, x in enumerate(self._parts):
            sent[:, :, :, place] = x[:, :, :, part].permute(2, 1, 0, 3, 4)
        return sent

    def opened(self, received, heads):
        """Arguments of attend()."""
        return *received.flatten(0, 1).transpose(0, 1).unbind(2), heads


class _Transfer:
    """An exchange: the p-th part of dimension 0 goes to process p, whose part for this one comes in its place.

    overlaps: whether it is only started, so that what is called before wait() runs beside it.
    """

    def __init__(self, sent, group, overlaps=False):
        self._sent = sent  # read until the exchange is over
        self._works = [] if overlaps else None
        self._received = _Exchange.apply(sent, group, self._works)

    def wait(self):
        """What came; on a GPU it is the current stream that waits, not the host."""
        for work in self._works or ():
            work.wait()
        self._sent = None
        return self._received


class _Exchange(torch.autograd.Function):
    """works: None, or the list that gets what must be waited for before the result is read."""

    @staticmethod
    def forward(ctx, sent, group, works):
        ctx.group = group
        received = torch.empty_like(sent)
        work = dist.all_to_all_single(received, sent, group=group, async_op=works is not None)
        if works is not None:
            works.append(work)
        return received

    @staticmethod
    def backward(ctx, grad):
        # the exchange is its own inverse
        return _Exchange.apply(grad.contiguous(), ctx.group, None), None, None
