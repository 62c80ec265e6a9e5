"""Attention of a few query blocks, taken apart by key block, so that any mask's output is one small product away.

For a query row r and a key block j: mass_rj = sum over the block of exp(S_rt - max_r), value_rj = the same sum of
exp(S_rt - max_r) V_t. Dense attention is sum_j value_rj / sum_j mass_rj, and the sparse branch under a mask M, hard or
soft, is sum_j M_j value_rj / sum_j M_j mass_rj. S is computed once for all sparsities, masks and the dense target.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ._kernels import K_BLOCK, MIN_LINEAR_WEIGHT, Q_BLOCK, block_count

FLOAT_BYTES = 4


@dataclass(frozen=True)
class BlockSums:
    """G (batch, head) pairs, r query blocks of R rows each; float32.

    mass (G, r, T_n, R), value (G, r, T_n, R, D): see the module's page. row_max (G, r, R).
    h (G, T_n, D, D), z (G, T_n, D): phi(K_j)^T V_j and the column sums of phi(K_j).
    mean_logits (G, r, R, T_n): q . mean(K_j) * scale + log(tokens of block j), the estimate of a block's log mass.
    phi_q (G, r, R, D). target (G, r, R, D): dense attention. valid (G, r, R): 0 on rows past a ragged end.
    """

    mass: Tensor
    value: Tensor
    row_max: Tensor
    h: Tensor
    z: Tensor
    mean_logits: Tensor
    phi_q: Tensor
    target: Tensor
    valid: Tensor

    def rows(self, part):
        """The BlockSums of some rows of every query block, ``part`` a slice of its R."""
        return BlockSums(
            self.mass[..., part], self.value[..., part, :], self.row_max[..., part], self.h, self.z,
            self.mean_logits[:, :, part], self.phi_q[:, :, part], self.target[:, :, part], self.valid[..., part],
        )  # fmt: skip

    def branches(self, mask):
        """Sparse and linear branch under masks (G, r, S, T_n) in [0, 1]: two tensors (G, r, S, R, D)."""
        head_dim = self.phi_q.shape[-1]
        tiny = torch.finfo(mask.dtype).tiny
        numerator = (mask @ self.value.flatten(3)).unflatten(-1, self.value.shape[3:])
        o_sparse = numerator / (mask @ self.mass).clamp_min(tiny)[..., None]
        rest = 1 - mask
        h = (rest.flatten(1, 2) @ self.h.flatten(2)).unflatten(1, rest.shape[1:3]).unflatten(-1, (head_dim, head_dim))
        z = (rest.flatten(1, 2) @ self.z).unflatten(1, rest.shape[1:3])
        phi_q = self.phi_q[:, :, None]
        norm = phi_q @ z[..., None]
        least = MIN_LINEAR_WEIGHT * mask.shape[-1] * K_BLOCK * phi_q.amax(dim=-1, keepdim=True)
        # without weight the ratio is 1: the same as O_s twice, of which no ratio is learned
        weightless = (norm < least) & (mask < 1).any(dim=-1)[..., None, None]
        o_linear = phi_q @ h / norm.where(norm >= least, 1.0)
        return o_sparse, o_sparse.where(weightless, o_linear)

    def log_masses(self, mask):
        """Log of the selected mass and of the unselected mass's estimate for hard masks (G, r, S, T_n): two (G, r, S, R)."""
        tiny = torch.finfo(mask.dtype).tiny
        selected = (mask @ self.mass).clamp_min(tiny).log() + self.row_max[:, :, None]
        unselected = self.mean_logits[:, :, None].masked_fill(mask[:, :, :, None] > 0, -torch.inf).logsumexp(dim=-1)
        return selected, unselected

    def estimated_ratio(self, mask):
        """The untrained mixing ratio m_s / (m_s + m_u), (G, r, S, R): 1 where nothing is left unselected."""
        selected, unselected = self.log_masses(mask)
        return torch.sigmoid(selected - unselected)

    def selected_share(self, mask):
        """The true attention mass on the selected keys, (G, r, S, R): what alpha stands for (Eq. 7)."""
        return mask @ self.mass / self.mass.sum(dim=2)[:, :, None]

    def output(self, mask, ratio):
        """SLA2's output under masks (G, r, S, T_n) and ratios (G, r, S) or (G, r, S, R): (G, r, S, R, D)."""
        o_sparse, o_linear = self.branches(mask)
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
    """(bytes per (batch, head) pair, bytes per query block of a pair) that ``block_sums`` and one step on it need."""
    blocks = block_count(tokens, K_BLOCK)
    pair = FLOAT_BYTES * (4 * tokens * head_dim + blocks * head_dim * (head_dim + 1))
    return pair, FLOAT_BYTES * query_block * (3 * tokens + blocks * (head_dim + 4))


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
    k_pair, v_pair = k[b, h].float(), v[b, h].float()
    k_pair = k_pair - k_pair.mean(dim=1, keepdim=True)
    blocks = block_count(keys, K_BLOCK)
    padding = (0, 0, 0, blocks * K_BLOCK - keys)
    k_blocks = F.pad(k_pair, padding).unflatten(1, (blocks, K_BLOCK))
    v_blocks = F.pad(v_pair, padding).unflatten(1, (blocks, K_BLOCK))
    last = keys - (blocks - 1) * K_BLOCK
    valid_keys = torch.full((blocks, 1), float(K_BLOCK), device=q.device)
    valid_keys[-1] = last

    phi_k = k_blocks.softmax(dim=-1)
    phi_k[:, -1, last:] = 0
    h_sums, z_sums = phi_k.transpose(2, 3) @ v_blocks, phi_k.sum(dim=2)
    del phi_k

    shape = query_blocks.shape[1], query_block
    means = k_blocks.sum(dim=2) / valid_keys
    mean_logits = (q_rows.flatten(1, 2) @ means.transpose(1, 2) * scale + valid_keys[:, 0].log()).unflatten(1, shape)
    logits = (q_rows.flatten(1, 2) @ k_blocks.flatten(1, 2).mul_(scale).transpose(1, 2)).unflatten(1, shape)
    logits[..., keys:] = -torch.inf
    row_max = logits.amax(dim=-1)
    p = logits.sub_(row_max[..., None]).exp_().unflatten(-1, (blocks, K_BLOCK)).transpose(2, 3)
    mass = p.sum(dim=-1)
    # one query block at a time: a broadcast product would copy V for each of them
    value = torch.stack([p[:, i] @ v_blocks for i in range(shape[0])], dim=1)
    target = value.sum(dim=2) / mass.sum(dim=2)[..., None]
    valid = (rows < tokens).float()
    return BlockSums(mass, value, row_max, h_sums, z_sums, mean_logits, q_rows.softmax(dim=-1), target, valid)
