"""q, k and v in 8 bit between processes that share a sequence, and block means in float32 for the selection.

INT8 with one scale per token and head; of k, each process's mean over its tokens is subtracted first, goes along in
float32, and is added again where the message is opened. Each element is off by at most 1/254 of the largest of its row
(token and head), before the rounding to q's dtype.

Block means are taken before the exchange, so the selection is that of a single process. A process's share of the sequence
need not be a multiple of a block: it sends the means of the blocks that lie within its share, and the few tokens at both ends
as they are. From these the receiver assembles the blocks that cross a border, and takes their means as of any other block: a
sum of partial sums would round differently.
"""

import math
from dataclasses import dataclass

import torch

from .quantization import INT8_MAX
from .router import K_BLOCK, Q_BLOCK, compute_dtype
from .support import on_device

ALIGNMENT = 16  # bytes: what kernels read widely
K_PLACE = 1  # k's among q, k, v


@dataclass(frozen=True)
class Share:
    """Which tokens of the sequence a process holds, [begin, end), and which of them form whole query blocks, of 128 whatever a call has, [first, last)."""

    begin: int
    end: int

    @property
    def first(self):
        return min(-(-self.begin // Q_BLOCK) * Q_BLOCK, self.end)

    @property
    def last(self):
        return max(self.end // Q_BLOCK * Q_BLOCK, self.first)

    @property
    def border(self):
        """Number of tokens outside whole blocks."""
        return self.end - self.begin - (self.last - self.first)

    def border_of(self, x):
        """Those tokens of x (B, N / P, H, D)."""
        return torch.cat([x[:, : self.first - self.begin], x[:, self.last - self.begin :]], dim=1)

    def whole_of(self, x):
        return x[:, self.first - self.begin : self.last - self.begin]


class EightBitExchange:
    """Messages of q, k and v (B, N / P, H, D) from process ``rank`` to each of P; routing: PoolRouting."""

    def __init__(self, q, k, v, processes, rank, routing):
        self._routing, self._dtype, self.triton = routing, q.dtype, routing.takes_triton(q)
        self._shares = [Share(p * q.shape[1], (p + 1) * q.shape[1]) for p in range(processes)]
        own = self._shares[rank]
        self._qkv = [x.unflatten(2, (processes, -1)) for x in (q, k, v)]
        # by destination from here on: (P, B, H / P, ...)
        self._pools = [
            _by_destination(_pools(routing, own.whole_of(x), block), processes)
            for x, block in ((q, routing.query_block), (k, K_BLOCK))
        ]
        self._shift = _by_destination(k.mean(dim=1, dtype=torch.float32), processes)
        self._border = [own.border_of(x).unflatten(2, (processes, -1)) for x in (q, k)]

    def message(self, part):
        """What goes to each process, uint8 (P, bytes): of its heads those in the slice ``part``."""
        layout = self._layout(part.stop - part.start)
        sent = torch.empty(len(self._shares), layout.size, dtype=torch.uint8, device=self._shift.device)
        fields = layout.fields(sent)
        for place, x in enumerate(self._qkv):
            shift = self._shift[:, :, part] if place == K_PLACE else None
            _encode(
                x[:, :, :, part], shift, fields["codes"][:, :, :, place], fields["scales"][:, :, :, place], self.triton
            )
        fields["shift"].copy_(self._shift[:, :, part])
        for name, pools in zip(("q_pools", "k_pools"), self._pools, strict=True):
            fields[name][:, :, :, : pools.shape[3]].copy_(pools[:, :, part])
        for place, x in enumerate(self._border):
            fields["border"][:, place, : x.shape[1]].copy_(x[:, :, :, part].permute(2, 1, 0, 3, 4))
        return sent

    def opened(self, received, heads):
        """Arguments of attend()."""
        heads_here = heads.stop - heads.start
        fields = self._layout(heads_here).fields(received)
        whole = torch.empty(fields["codes"].shape, dtype=self._dtype, device=received.device)
        _decode(fields["codes"], fields["scales"], fields["shift"], whole, self.triton)
        pools = [self._all_pools(fields, place) for place in (0, 1)]
        selected = self._routing.key_blocks(*pools, self._shares[-1].end, heads, self._dtype)
        return *whole.flatten(0, 1).transpose(0, 1).unbind(2), heads, selected

    def _layout(self, heads):
        batch, tokens, _, _, head_dim = self._qkv[0].shape
        whole = max(share.last - share.first for share in self._shares)
        border = max(share.border for share in self._shares)
        pooled = compute_dtype(self._qkv[0])
        return _Layout(
            codes=(torch.int8, (tokens, batch, 3, heads, head_dim)),
            scales=(torch.float32, (tokens, batch, 3, heads)),
            shift=(torch.float32, (batch, heads, head_dim)),
            q_pools=(pooled, (batch, heads, whole // self._routing.query_block, head_dim)),
            k_pools=(pooled, (batch, heads, whole // K_BLOCK, head_dim)),
            border=(self._dtype, (2, border, batch, heads, head_dim)),
        )

    def _all_pools(self, fields, place):
        """Means of all blocks of the sequence, (B, G, T, D), in order: of queries (place 0) or of keys (1)."""
        name, block = (("q_pools", self._routing.query_block), ("k_pools", K_BLOCK))[place]
        border = [fields["border"][p, place, : share.border] for p, share in enumerate(self._shares)]
        crossing = _pools(self._routing, torch.cat(border).transpose(0, 1), block)
        pieces, at, used = [], 0, 0
        for p, share in enumerate(self._shares):
            if share.first < share.last:
                before = (share.first - at) // block
                pieces += [crossing[:, :, used : used + before]]
                pieces += [fields[name][p, :, :, : (share.last - share.first) // block]]
                at, used = share.last, used + before
        return torch.cat([*pieces, crossing[:, :, used:]], dim=2)


def _by_destination(x, processes):
    """(B, H, ...) -> (P, B, H / P, ...)."""
    return x.unflatten(1, (processes, -1)).transpose(0, 1)


def _pools(routing, x, block):
    """Block means of x (B, N, H, D), (B, H, T, D); of no tokens there are none."""
    x = x.transpose(1, 2)
    if x.shape[2] == 0:
        return x.new_empty(x.shape, dtype=compute_dtype(x))
    return routing.pools(x, block)


class _Layout:
    """Where each field of a message lies. fields: name=(dtype, shape)."""

    def __init__(self, **fields):
        self._places, self.size = {}, 0
        for name, (dtype, shape) in fields.items():
            length = math.prod(shape) * dtype.itemsize
            self._places[name] = slice(self.size, self.size + length), dtype, shape
            self.size += -(-length // ALIGNMENT) * ALIGNMENT

    def fields(self, messages):
        """Views of messages uint8 (P, bytes): name -> (P, *shape)."""
        return {n: messages[:, at].view(dtype).unflatten(1, shape) for n, (at, dtype, shape) in self._places.items()}


def _encode(x, shift, codes, scales, triton):
    """Fills codes, int8 (P, N / P, B, G, D), and scales, float32 (P, N / P, B, G), of x (B, N / P, P, G, D).

    shift: float32 (P, B, G, D) to subtract first, or None. A row with NaN or infinity gets the scale NaN.
    """
    if triton:
        from .kernels.exchange_rows import encode

        with on_device(x.device):
            encode(x, shift, codes, scales)
        return
    rows = x.permute(2, 1, 0, 3, 4).float()
    if shift is not None:
        rows = rows - shift[:, None]
    scale = rows.abs().amax(dim=-1).clamp_min(1e-20) / INT8_MAX
    scales.copy_(torch.where(rows.isfinite().all(dim=-1), scale, torch.nan))
    codes.copy_((rows / scale[..., None]).round().nan_to_num(0.0))


def _decode(codes, scales, shift, whole, triton):
    """Fills whole, (P, N / P, B, 3, G, D), of codes alike, scales (P, N / P, B, 3, G) and k's shift (P, B, G, D)."""
    if triton:
        from .kernels.exchange_rows import decode

        with on_device(codes.device):
            decode(codes, scales, shift, whole)
        return
    rows = codes * scales[..., None]
    rows[:, :, :, K_PLACE] += shift[:, None]
    whole.copy_(rows)
