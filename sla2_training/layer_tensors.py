"""One layer's tensors during a training step: views, block means, and exact rows of a few query blocks."""

import torch

from ._kernels import (
    K_BLOCK,
    Q_BLOCK,
    block_count,
    forced_block_counts,
    mean_from_pools,
    own_key_blocks,
    pool_blocks,
    project,
    why_no_kernels,
)
from .block_sums import block_sums, memory_of
from .errors import TrainingError


class LayerTensors:
    """One layer's tensors as BHND views, their block means (k smoothed) and what follows from their shape.

    query_block: tokens of a query block. by_kernels: whether a step's sums are taken by kernels.
    prefix, suffix: keys before and after the video's, which every query attends: forced (ForcedBlocks) counts their blocks.
    """

    def __init__(self, layer, q, k, v, layout, scale, prefix=0, suffix=0, query_block=Q_BLOCK):
        if layout not in ("BHND", "BNHD"):
            raise ValueError(f'layout must be "BHND" or "BNHD", got {layout!r}.')
        tensors = (q, k, v) if layout == "BHND" else (x.transpose(1, 2) for x in (q, k, v))
        self.layer = layer
        self.q, self.k, self.v = (x.detach() for x in tensors)
        self.by_kernels = why_no_kernels(self.q, self.k, self.v) is None
        self.scale = q.shape[-1] ** -0.5 if scale is None else scale
        self.prefix, self.suffix, self.query_block = prefix, suffix, query_block
        self.forced = forced_block_counts(self.k.shape[2], prefix, suffix)
        self.query_block_count = block_count(self.q.shape[2], query_block)
        with torch.no_grad():
            self.q_pooled = pool_blocks(self.q, query_block).float()
            k_pooled = pool_blocks(self.k, K_BLOCK).float()
            self.k_mean = mean_from_pools(k_pooled, self.k.shape[2], K_BLOCK)
            self.k_pooled = k_pooled - self.k_mean

    def scores(self, proj_q, proj_k, blocks):
        """Router logits of the query blocks (B, H, R): (B, H, R, T_n)."""
        q_pooled = self.q_pooled.gather(2, blocks[..., None].expand(-1, -1, -1, self.q_pooled.shape[3]))
        return project(q_pooled, proj_q) @ project(self.k_pooled, proj_k).transpose(-1, -2) * self.scale

    def own(self, blocks):
        """Which key blocks hold the query blocks' own tokens, (B, H, R, T_n); none where queries are not the keys' tokens."""
        own = own_key_blocks(blocks, self.k_pooled.shape[2], self.prefix, self.query_block)
        queries_are_keys = self.q.shape[2] == self.k.shape[2] - self.prefix - self.suffix
        return own if queries_are_keys else torch.zeros_like(own)

    def check(self, heads, head_dim):
        """Raises ValueError for another model's shape, TrainingError for NaN or infinity."""
        if (self.q.shape[1], self.q.shape[3]) != (heads, head_dim):
            raise ValueError(
                f"layer {self.layer} has {self.q.shape[1]} heads of {self.q.shape[3]}, the router {heads} of {head_dim}."
            )
        for name, x in (("q", self.q), ("k", self.k), ("v", self.v)):
            # torch.isfinite(x) would take two and a half times x's memory, more than a step does
            if not bool(torch.isfinite(torch.stack(torch.aminmax(x))).all()):
                raise TrainingError(
                    f"Training stopped at layer {self.layer}: its {name} holds NaN or infinity, which the model itself "
                    "made; try another precision for the model."
                )

    def draw(self, count, generator):
        """``count`` random query blocks (or all there are) of each (batch, head) pair, (B, H, R) int64."""
        pairs = self.q.shape[0] * self.q.shape[1]
        drawn = torch.rand(pairs, self.query_block_count, generator=generator).argsort(dim=1)
        return drawn[:, :count].sort(dim=1).values.unflatten(0, self.q.shape[:2]).to(self.q.device)

    def chunks(self, blocks, memory_bytes):
        """(pairs, rows) slices whose working memory keeps the bound; at least one pair and one query block each."""
        per_pair, per_block = memory_of(self.k.shape[2], self.k.shape[3], self.query_block)
        pairs, drawn = blocks.shape[0] * blocks.shape[1], blocks.shape[2]
        group = max(1, memory_bytes // (per_pair + drawn * per_block))
        rows = drawn if group > 1 else min(drawn, max(1, (memory_bytes - per_pair) // per_block))
        for i in range(0, pairs, group):
            for j in range(0, drawn, rows):
                yield slice(i, i + group), slice(j, j + rows)

    def rows_of(self, blocks):
        """Rows of query blocks (P, r), int64 (P, r, R), and which of them there are, bool; past a ragged end, the last one."""
        rows = blocks[..., None] * self.query_block + torch.arange(self.query_block, device=blocks.device)
        return rows.clamp_max(self.q.shape[2] - 1), rows < self.q.shape[2]

    def gathered(self, b, heads, rows):
        """Rows (G, r, R) of q of some heads (a slice) of a batch entry, (G, r, R, D)."""
        index = rows.flatten(1)[..., None].expand(-1, -1, self.q.shape[3])
        return self.q[b, heads].gather(1, index).unflatten(1, rows.shape[1:])

    def sums(self, blocks, chunk):
        """BlockSums of one chunk of the query blocks (B, H, R)."""
        pairs, rows = chunk
        numbers = torch.arange(blocks.shape[0] * blocks.shape[1], device=blocks.device)
        drawn = blocks.flatten(0, 1)[pairs, rows]
        return block_sums(self.q, self.k, self.v, numbers[pairs], drawn, self.scale, self.query_block)
