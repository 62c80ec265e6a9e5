"""Attention of a few query blocks, taken apart by key block, so that any mask's output is one small product away.

For a query row r and a key block j: mass_rj = sum over the block of exp(S_rt - max_r), value_rj = the same sum of
exp(S_rt - max_r) V_t. Dense attention is sum_j value_rj / sum_j mass_rj, and the sparse branch under a mask M, hard or
soft, is sum_j M_j value_rj / sum_j M_j mass_rj. S is computed once for all sparsities, masks and the dense target.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ._kernels import K_BLOCK, MIN_LINEAR_WEIGHT, Q_BLOCK, block_count, key_block_sums

FLOAT_BYTES = 4


@dataclass(frozen=True)
class LinearSums:
    """The linear branch of G (batch, head) pairs and r query blocks of R rows each; float32.

    h (G, T_n, D, D), z (G, T_n, D): phi(K_j)^T V_j and the column sums of phi(K_j). phi_q (G, r, R, D).
    """

    h: Tensor
    z: Tensor
    phi_q: Tensor

    def branch(self, mask):
        """Linear branch under masks (G, r, S, T_n), the norm it was divided by, and where there is too little of it.

        (G, r, S, R, D), (G, r, S, R) and bool (G, r, S, R): there the norm is taken as 1.
        """
        head_dim = self.phi_q.shape[-1]
        rest = (1 - mask).flatten(1, 2)
        h = (rest @ self.h.flatten(2)).unflatten(1, mask.shape[1:3]).unflatten(-1, (head_dim, head_dim))
        z = (rest @ self.z).unflatten(1, mask.shape[1:3])
        norm = z @ self.phi_q.transpose(2, 3)
        least = MIN_LINEAR_WEIGHT * mask.shape[-1] * K_BLOCK * self.phi_q.amax(dim=-1)
        # nothing at all, as in a row past a ragged end, is too little as well
        too_little = norm <= least[:, :, None]
        norm = norm.masked_fill(too_little, 1.0)
        return self.phi_q[:, :, None] @ h / norm[..., None], norm, too_little

    def add_gradient(self, grad, by_numerator, minus_by_norm):
        """Adds the branch's share to the masks' gradient (G, r, S, T_n) in place, by those of its numerator and norm.

        by_numerator (G, r, S, R, D); minus_by_norm (G, r, S, R); both 0 where there is too little.
        """
        h = (self.phi_q.transpose(2, 3)[:, :, None] @ by_numerator).flatten(1, 2).flatten(2)
        z = (minus_by_norm @ self.phi_q).flatten(1, 2)
        grad = grad.view(*h.shape[:2], -1)
        grad.baddbmm_(h, self.h.flatten(2).transpose(1, 2), alpha=-1)
        grad.baddbmm_(z, self.z.transpose(1, 2))


@dataclass(frozen=True)
class SparseSums:
    """mass (G, r, T_n, R), value (G, r, T_n, R, D): see the module's page. row_max (G, r, R) with k smoothed, None from
    kernels. float32, any stride."""

    mass: Tensor
    value: Tensor
    row_max: Tensor | None

    def numerator(self, mask, out=None):
        """sum_j M_j value_j under masks (G, r, S, T_n): (G, r, S, R, D), written to ``out`` where given."""
        shape = *mask.shape[:3], *self.value.shape[3:]
        out = None if out is None else out.view(-1, mask.shape[2], shape[3] * shape[4])
        return torch.bmm(mask.flatten(0, 1), self._values(), out=out).view(shape)

    def mask_gradient(self, by_numerator, out):
        """The masks' gradient by that of their numerators (G, r, S, R, D), written to out, (G, r, S, T_n)."""
        torch.bmm(by_numerator.flatten(3).flatten(0, 1), self._values().transpose(1, 2), out=_as_batch(out))

    def _values(self):
        return self.value.flatten(3).flatten(0, 1)

    def denominator(self, mask):
        """sum_j M_j mass_j under masks (G, r, S, T_n): (G, r, S, R)."""
        return mask @ self.mass

    def add_denominator(self, mask, out):
        """Adds denominator(mask) to out, (G, r, S, R)."""
        _as_batch(out).baddbmm_(mask.flatten(0, 1), self.mass.flatten(0, 1))


def _as_batch(out):
    """out (G, r, ...) as (G * r, ...), to write to: never a copy, as flatten() may be."""
    return out.view(-1, *out.shape[2:])


@dataclass(frozen=True)
class BlockSums:
    """G (batch, head) pairs, r query blocks of R rows each; float32.

    sparse, linear: the two branches. mean_logits (G, r, R, T_n): q . mean(K_j) * scale + log(tokens of block j), the
    estimate of a block's log mass. target (G, r, R, D): dense attention. valid (G, r, R): 0 on rows past a ragged end.
    """

    sparse: SparseSums
    linear: LinearSums
    mean_logits: Tensor
    target: Tensor
    valid: Tensor

    @property
    def mass(self):
        """(G, r, T_n, R)."""
        return self.sparse.mass

    def rows(self, part):
        """The BlockSums of some rows of every query block, ``part`` a slice of its R."""
        sparse, linear = self.sparse, self.linear
        return BlockSums(
            SparseSums(sparse.mass[..., part], sparse.value[..., part, :], sparse.row_max[..., part]),
            LinearSums(linear.h, linear.z, linear.phi_q[:, :, part]),
            self.mean_logits[:, :, part], self.target[:, :, part], self.valid[..., part],
        )  # fmt: skip

    def branches(self, mask):
        """Sparse and linear branch under masks (G, r, S, T_n) in [0, 1]: two tensors (G, r, S, R, D)."""
        tiny = torch.finfo(mask.dtype).tiny
        o_sparse = self.sparse.numerator(mask) / self.sparse.denominator(mask).clamp_min(tiny)[..., None]
        o_linear, _, too_little = self.linear.branch(mask)
        # without weight the ratio is 1: the same as O_s twice, of which no ratio is learned
        weightless = too_little & (mask < 1).any(dim=-1)[..., None]
        return o_sparse, o_sparse.where(weightless[..., None], o_linear)

    def log_masses(self, mask):
        """Log of the selected mass and of the unselected mass's estimate for hard masks (G, r, S, T_n): two (G, r, S, R)."""
        tiny = torch.finfo(mask.dtype).tiny
        selected = self.sparse.denominator(mask).clamp_min(tiny).log() + self.sparse.row_max[:, :, None]
        unselected = self.mean_logits[:, :, None].masked_fill(mask[:, :, :, None] > 0, -torch.inf).logsumexp(dim=-1)
        return selected, unselected

    def estimated_ratio(self, mask):
        """The untrained mixing ratio m_s / (m_s + m_u), (G, r, S, R): 1 where nothing is left unselected."""
        selected, unselected = self.log_masses(mask)
        return torch.sigmoid(selected - unselected)

    def selected_share(self, mask):
        """The true attention mass on the selected keys, (G, r, S, R): what alpha stands for (Eq. 7)."""
        return mask @ self.mass / self.mass.sum(dim=2)[:, :, None]

    def output(self, mask, ratio, branches=None):
        """SLA2's output under masks (G, r, S, T_n) and ratios (G, r, S) or (G, r, S, R): (G, r, S, R, D).

        branches: branches(mask), where they are known.
        """
        o_sparse, o_linear = self.branches(mask) if branches is None else branches
        ratio = (ratio[..., None] if ratio.dim() == 3 else ratio)[..., None]
        ratio = torch.where((mask < 1).any(dim=-1)[..., None, None], ratio, 1.0)
        return o_linear + ratio * (o_sparse - o_linear)

    def squared_error(self, out):
        """Squared distance of outputs (G, r, S, R, D) to dense attention per query block, (G, r, S)."""
        difference = (out - self.target[:, :, None]) * self.valid[:, :, None, :, None]
        return difference.square().sum(dim=(-2, -1))

    def energy(self):
        """Squared norm of the dense output per query block, (G, r)."""
        return (self.target * self.valid[..., None]).square().sum(dim=(-2, -1))


def memory_of(tokens, head_dim, query_block=Q_BLOCK):
    """(bytes per (batch, head) pair, bytes per query block of a pair) that ``block_sums`` and outputs of six masks need.

    Their sum is the least that an optimisation step works in, whatever its plan (step_sums.step_plan).
    """
    blocks = block_count(tokens, K_BLOCK)
    pair = FLOAT_BYTES * (4 * tokens * head_dim + blocks * head_dim * (head_dim + 1))
    return pair, FLOAT_BYTES * query_block * (tokens + blocks * (head_dim + 4) + 48 * head_dim)


class HeadWork:
    """Buffers in which one (batch, head) pair at a time is worked on; zero past a ragged end of the keys.

    rows: of queries at a time. k (M, D), v (T_n * 64, D), logits (rows, T_n * 64); float32.
    """

    def __init__(self, rows, keys, head_dim, device):
        padded = block_count(keys, K_BLOCK) * K_BLOCK
        self.keys = keys
        self.k = torch.empty(keys, head_dim, device=device)
        self.v = torch.empty(padded, head_dim, device=device)
        self.logits = torch.empty(rows, padded, device=device)
        self.v[keys:], self.logits[:, keys:] = 0, 0

    def sum_pair(self, q, k, v, k_mean, scale, mass, value, row_max):
        """Sums of one pair, written to mass (rows, T_n), value (T_n, rows, D) and row_max (rows, 1).

        q (rows, D): float32. k, v (M, D): any float dtype. k_mean (1, D).
        """
        torch.sub(k, k_mean, out=self.k)
        self.v[: self.keys].copy_(v)
        logits = self.logits[:, : self.keys].addmm_(q, self.k.T, beta=0, alpha=scale)
        torch.amax(logits, dim=-1, keepdim=True, out=row_max)
        logits.sub_(row_max).exp_()
        p = self.logits.unflatten(1, (-1, K_BLOCK))
        torch.sum(p, dim=-1, out=mass)
        torch.bmm(p.transpose(0, 1), self.v.unflatten(0, (-1, K_BLOCK)), out=value)


def sparse_sums(q, k, v, k_mean, scale, work=None, mass=None):
    """SparseSums of G (batch, head) pairs, exact in float32, with k smoothed by its mean.

    Args:
        q: (G, r, R, D) float32. k, v: (G, M, D), any float dtype and stride. k_mean: (G, 1, D) float32.
        work: HeadWork for r * R rows, mass: float32 (G, r, R, T_n) to write to; None makes them.
    """
    pairs, drawn, rows, head_dim = q.shape
    blocks = block_count(k.shape[1], K_BLOCK)
    work = HeadWork(drawn * rows, k.shape[1], head_dim, q.device) if work is None else work
    mass = q.new_empty(pairs, drawn, rows, blocks) if mass is None else mass
    # key blocks first: one product over all pairs and query blocks reads it as it lies
    value = q.new_empty(blocks, pairs, drawn * rows, head_dim)
    row_max = q.new_empty(pairs, drawn * rows, 1)
    for g in range(pairs):
        work.sum_pair(q[g].flatten(0, 1), k[g], v[g], k_mean[g], scale, mass[g].flatten(0, 1), value[:, g], row_max[g])
    return _sparse_sums(mass, value, row_max.view(pairs, drawn, rows))


def sparse_sums_by_kernels(q, k, v, largest, scale, mass):
    """SparseSums of 16-bit q (G, r, R, D), k and v (G, M, D), whose values are exact to 2^-17 of each weight (key_block_sums).

    largest: of largest_scores(). mass: float32 (G, r, R, T_n) to write to.
    """
    return _sparse_sums(mass, key_block_sums(q.flatten(1, 2), k, v, largest, scale, mass.flatten(1, 2)))


def _sparse_sums(mass, value, row_max=None):
    """mass (G, r, R, T_n), value (T_n, G, r * R, D)."""
    return SparseSums(mass.transpose(2, 3), value.unflatten(2, mass.shape[1:3]).permute(1, 2, 0, 3, 4), row_max)


def linear_sums(k, v, k_mean, phi_q):
    """LinearSums of k, v (G, M, D), any float dtype and stride, k_mean (G, 1, D) and phi_q (G, r, R, D)."""
    keys, blocks = k.shape[1], block_count(k.shape[1], K_BLOCK)
    padded = k_mean.new_empty(k.shape[0], blocks * K_BLOCK, k.shape[2])
    torch.sub(k, k_mean, out=padded[:, :keys])
    phi_k = padded.softmax(dim=-1)
    phi_k[:, keys:] = 0
    padded[:, :keys].copy_(v)
    padded[:, keys:] = 0
    phi_k, v_blocks = (x.unflatten(1, (blocks, K_BLOCK)) for x in (phi_k, padded))
    return LinearSums(phi_k.transpose(2, 3) @ v_blocks, phi_k.sum(dim=2), phi_q)


@torch.no_grad()
def block_sums(q, k, v, pairs, query_blocks, scale, query_block=Q_BLOCK):
    """BlockSums of some query blocks of some (batch, head) pairs, exact in float32, with k smoothed by its mean.

    Args:
        q: (B, H, N, D); k, v: (B, H, M, D): any float dtype and stride.
        pairs: int64 (G,), batch * H + head. query_blocks: int64 (G, r), of ``query_block`` rows each.
    """
    heads, tokens, keys = q.shape[1], q.shape[2], k.shape[2]
    b, h = pairs // heads, pairs % heads
    rows = query_blocks[..., None] * query_block + torch.arange(query_block, device=q.device)
    q_rows = q[b[:, None, None], h[:, None, None], rows.clamp_max(tokens - 1)].float()
    k_pair, v_pair = k[b, h], v[b, h]
    k_mean = k_pair.mean(dim=1, keepdim=True, dtype=torch.float32)
    blocks = block_count(keys, K_BLOCK)
    sparse = sparse_sums(q_rows, k_pair, v_pair, k_mean, scale)
    ones = q_rows.new_ones(*query_blocks.shape, 1, blocks)
    target = (sparse.numerator(ones) / sparse.denominator(ones)[..., None])[:, :, 0]

    padding = (0, 0, 0, blocks * K_BLOCK - keys)
    valid_keys = torch.full((blocks, 1), float(K_BLOCK), device=q.device)
    valid_keys[-1] = keys - (blocks - 1) * K_BLOCK
    means = F.pad(k_pair - k_mean, padding).unflatten(1, (blocks, K_BLOCK)).sum(dim=2) / valid_keys
    mean_logits = q_rows.flatten(1, 2) @ means.transpose(1, 2) * scale + valid_keys[:, 0].log()
    linear = linear_sums(k_pair, v_pair, k_mean, q_rows.softmax(dim=-1))
    return BlockSums(sparse, linear, mean_logits.unflatten(1, rows.shape[1:]), target, (rows < tokens).float())
