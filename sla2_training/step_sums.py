"""What one optimisation step needs of attention under its masks: errors, their gradient and the ratios' equations.

Two levels, so that few launches do it within the memory bound. A group of heads shares the linear branch and all that is
elementwise; in it a few heads at a time have their value sums, by far the largest tensor, in memory.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ._kernels import K_BLOCK, block_count, largest_scores
from .block_sums import FLOAT_BYTES, HeadWork, linear_sums, sparse_sums, sparse_sums_by_kernels

# Denominators begin with it, so that what is divided by their square stays finite: a row with less of its softmax under a
# mask counts as one without attention there.
LEAST_MASS = 2.0**-100
# launches per group and per part of a group; without kernels 8 more per pair, whatever the plan
GROUP_COST, PART_COST = 60, 7


@dataclass(frozen=True)
class StepPlan:
    """group: heads of one batch entry that share a pass. part: of them at a time with value sums in memory. rows: query
    blocks of each head at a time; all that are drawn, or else group is 1."""

    group: int
    part: int
    rows: int


@dataclass(frozen=True)
class StepSums:
    """Sums over the rows of P = B * H pairs with r query blocks each, float32.

    product, norm (P, r, S): d . (dense - O_l) and d . d with d = O_s - O_l under the hard masks. Under the soft masks,
    None without: error (), the squared distance to the dense output; energy (), the dense output's squared norm;
    gradient (P, r, S, T_n), half of error's by the masks.
    """

    product: Tensor
    norm: Tensor
    error: Tensor | None = None
    energy: Tensor | None = None
    gradient: Tensor | None = None


@torch.no_grad()
def step_sums(tensors, blocks, hard, memory_bytes, soft=None, ratios=None):
    """StepSums of the query blocks (B, H, r) under masks (B * H, r, S, T_n); ``ratios`` (B * H, r, S) go with the soft ones."""
    batch, heads, drawn = blocks.shape
    shape = tensors.k.shape[2], tensors.k.shape[3], tensors.query_block, hard.shape[2]
    pairs = _Pairs(tensors, blocks, hard, soft, ratios)
    memory_bytes -= FLOAT_BYTES * (pairs.masks.numel() + 4 * hard.numel())
    plan = step_plan(heads, drawn, *shape, memory_bytes, tensors.by_kernels)
    distances, targets = [], []
    for b in range(batch):
        for i in range(0, heads, plan.group):
            for j in range(0, drawn, plan.rows):
                group = _Group(pairs, b, slice(i, min(i + plan.group, heads)), slice(j, j + plan.rows))
                group.attend(plan.part)
                group.solve()
                if soft is not None:
                    group.differentiate()
                    # by row: one sum over all of them loses digits in float32
                    distances.append(torch.linalg.vector_norm(group.distance, dim=-1).flatten())
                    targets.append(torch.linalg.vector_norm(group.numerator[:, :, -1], dim=-1).flatten())
                # its tensors make room for the next one's
                del group
    norm = pairs.root.square_()
    if soft is None:
        return StepSums(pairs.product, norm)
    error, energy = (torch.cat(norms).square_().sum() for norms in (distances, targets))
    return StepSums(pairs.product, norm, error, energy, pairs.gradient)


@lru_cache
def step_plan(heads, drawn, keys, head_dim, query_block, sparsities, memory_bytes, by_kernels=False):
    """The StepPlan of fewest launches within ``memory_bytes``; one pair and one query block where even that is more."""
    shape = keys, head_dim, query_block, sparsities, by_kernels
    sizes = [(group, part) for group in range(1, heads + 1) for part in range(1, group + 1)]
    plans = [StepPlan(group, part, drawn) for group, part in sizes]
    fitting = [plan for plan in plans if step_memory(plan, *shape) <= memory_bytes]
    if fitting:
        return min(fitting, key=lambda plan: (_launches(plan, heads), plan.part, plan.group))
    rows = (rows for rows in range(drawn, 1, -1) if step_memory(StepPlan(1, 1, rows), *shape) <= memory_bytes)
    return StepPlan(1, 1, next(rows, 1))


def _launches(plan, heads):
    groups = [min(plan.group, heads - first) for first in range(0, heads, plan.group)]
    return len(groups) * GROUP_COST + sum(-(-group // plan.part) for group in groups) * PART_COST


def step_memory(plan, keys, head_dim, query_block, sparsities, by_kernels=False):
    """Bytes that one group needs at most, beside the masks of all pairs and their gradient.

    by_kernels: no logits and no copies of K and V are made.
    """
    blocks, masks = block_count(keys, K_BLOCK), 2 * sparsities + 1
    padded, rows = blocks * K_BLOCK, plan.rows * query_block
    # numerators and linear branches of all masks, distances of the soft ones, q and phi_q; masses; a number per row
    kept = rows * ((masks + 3 * sparsities + 2) * head_dim + blocks + 6 * masks)
    sums = blocks * head_dim * (head_dim + 1)
    of_masks = (masks - 1) * head_dim * (plan.rows * head_dim + rows)
    linear = max(2 * padded * head_dim + sums, sums + of_masks)
    one_pair = 0 if by_kernels else rows * padded + (padded + keys) * head_dim
    of_part = rows * head_dim * (blocks + sparsities)
    return FLOAT_BYTES * (plan.group * kept + max(plan.group * linear, one_pair + plan.part * of_part))


class _Pairs:
    """What all groups share: masks (P, r, n, T_n), the soft ones, the hard ones and one of ones; ratios; results.

    partial (P, r, S): where the hard masks leave blocks out. root (P, r, S): of StepSums.norm.
    """

    def __init__(self, tensors, blocks, hard, soft, ratios):
        self.tensors, self.soft = tensors, 0 if soft is None else soft.shape[2]
        of_both = [hard] if soft is None else [soft, hard]
        self.masks = torch.cat([*of_both, torch.ones_like(hard[:, :, :1])], dim=2)
        self.partial, self.ratios = (hard < 1).any(dim=-1), ratios
        self.product, self.root = hard.new_empty(2, *hard.shape[:3])
        self.gradient = None if soft is None else torch.empty_like(soft)
        self.rows, self.valid = tensors.rows_of(blocks.flatten(0, 1))
        # and infinite where there is no query
        self.floor = torch.where(self.valid, LEAST_MASS, torch.inf)[:, :, None]


class _Group:
    """Some heads of a batch entry, or some query blocks of one head: G pairs, r query blocks of R rows each, n masks.

    numerator (G, r, n, R, D), denominator (G, r, n, R): of the sparse branches. mass (G, r, R, T_n).
    o_linear (G, r, n - 1, R, D), norm, too_little: of LinearSums.branch(); the soft masks' o_linear are times 1 - ratio.
    ratio (G, r, S, R): 1 where the linear branch has too little weight. distance (G, r, S, R, D): soft outputs minus dense.
    """

    def __init__(self, pairs, b, heads, rows):
        tensors, first = pairs.tensors, b * pairs.tensors.q.shape[1]
        here = slice(first + heads.start, first + heads.stop), rows
        self.k, self.v, self.k_mean = tensors.k[b, heads], tensors.v[b, heads], tensors.k_mean[b, heads]
        self.scale, self.masks, self.partial = tensors.scale, pairs.masks[here], pairs.partial[here]
        self.product, self.root = pairs.product[here], pairs.root[here]
        q, self.by_kernels = tensors.gathered(b, heads, pairs.rows[here]), tensors.by_kernels
        self.q = q if self.by_kernels else q.float()
        self.phi_q = q.softmax(dim=-1, dtype=torch.float32).mul_(pairs.valid[here][..., None])
        self.o_linear, self.norm, self.too_little = self._linear().branch(self.masks[:, :, :-1])
        head_dim = self.q.shape[3]
        self.denominator = pairs.floor[here].repeat(1, 1, self.masks.shape[2], 1)
        self.numerator = self.phi_q.new_empty(*self.denominator.shape, head_dim)
        self.mass = self.phi_q.new_empty(*self.q.shape[:3], self.masks.shape[3])
        self.soft = pairs.soft
        if self.soft:
            self.gradient = pairs.gradient[here]
            self.ratio = pairs.ratios[here][..., None].masked_fill(self.too_little[:, :, : self.soft], 1.0)
            self.rest = 1 - self.ratio
            self.o_linear[:, :, : self.soft].mul_(self.rest[..., None])
            self.weight = torch.empty_like(self.ratio)
            self.distance = self.phi_q.new_empty(*self.ratio.shape, head_dim)

    def _linear(self):
        return linear_sums(self.k, self.v, self.k_mean, self.phi_q)

    def attend(self, part):
        """Sparse branches and, of soft masks, distances and the gradient by their numerators; ``part`` pairs at a time."""
        pairs, drawn, rows, head_dim = self.q.shape
        if self.by_kernels:
            largest = largest_scores(self.q.flatten(1, 2), self.k, self.scale)
        else:
            work = HeadWork(drawn * rows, self.k.shape[1], head_dim, self.q.device)
        for first in range(0, pairs, part):
            some = slice(first, first + part)
            q, k, v, mass = self.q[some], self.k[some], self.v[some], self.mass[some]
            # not kept in a name: the next part's sums need their room
            if self.by_kernels:
                self._attend(some, sparse_sums_by_kernels(q, k, v, largest[some], self.scale, mass))
            else:
                self._attend(some, sparse_sums(q, k, v, self.k_mean[some], self.scale, work, mass))

    def _attend(self, part, sums):
        masks, numerator, denominator = self.masks[part], self.numerator[part], self.denominator[part]
        sums.numerator(masks, out=numerator)
        sums.add_denominator(masks, denominator)
        if not self.soft:
            return
        weight, distance = self.weight[part], self.distance[part]
        torch.div(self.ratio[part], denominator[:, :, : self.soft], out=weight)
        torch.addcmul(
            self.o_linear[part, :, : self.soft], numerator[:, :, : self.soft], weight[..., None], out=distance
        )
        distance.addcdiv_(numerator[:, :, -1:], denominator[:, :, -1:, :, None], value=-1)
        sums.mask_gradient(distance * weight[..., None], out=self.gradient[part])

    def solve(self):
        """The hard masks' share of the ratios' equations."""
        hard = self.numerator[:, :, self.soft :].div_(self.denominator[:, :, self.soft :, :, None])
        o_linear, too_little = self.o_linear[:, :, self.soft :], self.too_little[:, :, self.soft :]
        difference = hard[:, :, :-1] - o_linear
        difference.masked_fill_((too_little & self.partial[..., None])[..., None], 0.0)
        torch.sum((hard[:, :, -1:] - o_linear).mul_(difference), dim=(3, 4), out=self.product)
        torch.linalg.vector_norm(difference, dim=(3, 4), out=self.root)

    def differentiate(self):
        """Completes the gradient, half of it."""
        soft, distance = slice(0, self.soft), self.distance
        by_sum = (
            (distance * self.numerator[:, :, soft]).sum(dim=-1).mul_(self.weight).div_(self.denominator[:, :, soft])
        )
        self.gradient.view(-1, *self.gradient.shape[2:]).baddbmm_(
            by_sum.flatten(0, 1), self.mass.flatten(0, 1), alpha=-1
        )
        minus_by_norm = (distance * self.o_linear[:, :, soft]).sum(dim=-1).div_(self.norm[:, :, soft])
        by_numerator = distance * self.rest.div_(self.norm[:, :, soft])[..., None]
        self._linear().add_gradient(self.gradient, by_numerator, minus_by_norm)
