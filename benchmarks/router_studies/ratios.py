"""How to mix the two branches: no linear branch, one ratio per head, knots, estimated mass, corrected estimated mass.

For one row the squared error is quadratic in its ratio r: c - 2 p r + n r^2 with d = O_s - O_l, n = |d|^2,
p = d . (T - O_l), c = |T - O_l|^2. So every rule is judged, and fitted, on a few numbers per row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from miniature.captures import by_layer

from .training import layer_tensors, table, train

KNOTS = (2, 4, 8)


@dataclass(frozen=True)
class Rows:
    """Rows of one layer, each (H, rows, S) but position (H, rows) in [0, 1] along the query axis; energy a number."""

    c: Tensor
    p: Tensor
    n: Tensor
    log_odds: Tensor
    log_odds_second_order: Tensor
    share: Tensor
    position: Tensor
    energy: Tensor

    def error(self, ratio):
        """Relative squared error, (S,), of ratios that broadcast to (H, rows, S)."""
        return (self.c - 2 * self.p * ratio + self.n * ratio**2).sum(dim=(0, 1)) / self.energy


@torch.no_grad()
def collect_rows(trainer, captures):
    """Rows of some captures of one layer under the trained router."""
    parts = {name: [] for name in ("c", "p", "n", "log_odds", "log_odds_second_order", "share", "position")}
    energy = 0.0
    for capture in captures:
        tensors = layer_tensors(capture)
        blocks = tensors.draw(trainer.query_blocks, trainer.generator)
        weights = trainer.layer_state(capture.layer)
        scores = tensors.scores(weights.proj_q, weights.proj_k, blocks)
        masks = trainer.hard_masks(scores, trainer.always_selected(tensors, blocks))
        heads = tensors.q.shape[1]
        for pair in range(masks.shape[0]):
            chunk = slice(pair, pair + 1), slice(None)
            sums, mask = tensors.sums(blocks, chunk), masks[pair : pair + 1]
            o_sparse, o_linear = sums.branches(mask)
            valid = sums.valid[:, :, None, :, None]
            d, rest = (o_sparse - o_linear) * valid, (sums.target[:, :, None] - o_linear) * valid
            selected, unselected = sums.log_masses(mask)
            variance = _key_variance(tensors, pair)
            q = _query_rows(tensors, blocks, pair)
            second = sums.mean_logits + 0.5 * tensors.scale**2 * (q.square() @ variance.T)[None]
            second = second[:, :, None].masked_fill(mask[:, :, :, None] > 0, -torch.inf).logsumexp(dim=-1)
            here = {
                "c": rest.square().sum(-1),
                "p": (d * rest).sum(-1),
                "n": d.square().sum(-1),
                "log_odds": selected - unselected,
                "log_odds_second_order": selected - second,
                "share": sums.selected_share(mask),
            }
            for name, value in here.items():
                parts[name].append((pair % heads, value[0].transpose(1, 2).flatten(0, 1)))
            place = blocks.flatten(0, 1)[pair] / max(1, tensors.query_block_count - 1)
            parts["position"].append((pair % heads, place.repeat_interleave(q.shape[1])))
            energy = energy + sums.energy().sum()
    joined = {
        name: torch.stack([torch.cat([v for head, v in values if head == h]) for h in range(heads)])
        for name, values in parts.items()
    }
    return Rows(**joined, energy=energy)


def _key_variance(tensors, pair):
    """Variance of each key block's tokens per channel, (T_n, D); a ragged last block counts its valid tokens."""
    k = tensors.k[pair // tensors.k.shape[1], pair % tensors.k.shape[1]].float()
    return torch.stack([part.var(dim=0, unbiased=False) for part in k.split(64)])


def _query_rows(tensors, blocks, pair):
    q = tensors.q[pair // tensors.q.shape[1], pair % tensors.q.shape[1]].float()
    rows = blocks.flatten(0, 1)[pair][:, None] * 128 + torch.arange(128, device=q.device)
    return q[rows.clamp_max(q.shape[0] - 1)]


def hat_basis(position, knots):
    """Linear interpolation weights of ``knots`` knots at positions in [0, 1]: (..., knots)."""
    at = position[..., None] * (knots - 1) - torch.arange(knots, device=position.device)
    return (1 - at.abs()).clamp_min(0)


def fit_constant(rows):
    return (rows.p.sum(dim=1) / rows.n.sum(dim=1).clamp_min(1e-30)).clamp(0, 1)[:, None]


def fit_knots(rows, knots):
    """Best ratios at the knots per head and sparsity, (H, knots, S), by least squares."""
    basis = hat_basis(rows.position, knots)
    gram = torch.einsum("hra,hrb,hrs->hsab", basis, basis, rows.n)
    right = torch.einsum("hra,hrs->hsa", basis, rows.p)
    ridge = 1e-6 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * torch.eye(knots, device=basis.device)
    return torch.linalg.solve(gram + ridge, right).clamp(0, 1).transpose(1, 2)


def fit_correction(rows, log_odds, *, scale):
    """(factor, offset), each (H, 1, S): ratio = sigmoid(factor * log odds + offset) fitted by Adam; factor 1 unless ``scale``."""
    shape = (rows.p.shape[0], 1, rows.p.shape[2])
    factor, offset = torch.ones(shape, device=rows.p.device), torch.zeros(shape, device=rows.p.device)
    learned = [offset.requires_grad_(True)] + ([factor.requires_grad_(True)] if scale else [])
    optimizer = torch.optim.Adam(learned, lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        rows.error(torch.sigmoid(factor * log_odds + offset)).sum().backward()
        optimizer.step()
    return factor.detach(), offset.detach()


def ratio_study(train_captures, held_out, *, steps, sparsities, options):
    """Text: held-out error of every mixing rule under one trained router; fitted rules are fitted on the training captures."""
    trainer, _ = train(train_captures, options, steps=steps, sparsities=sparsities)
    trainer.generator.manual_seed(1)
    fit_on, test_on = by_layer(train_captures), by_layer(held_out)
    results = {}
    for layer, captures in test_on.items():
        fitted, rows = collect_rows(trainer, fit_on[layer]), collect_rows(trainer, captures)
        for name, ratio in _ratios(fitted, rows).items():
            results.setdefault(name, []).append(rows.error(ratio))
    table_rows = [(name, torch.stack(errors).mean(dim=0).sqrt().tolist()) for name, errors in results.items()]
    return table("mixing ratio (trained router)", map(str, sparsities), table_rows)


def _ratios(fitted, rows):
    ratios = {
        "no linear branch": torch.ones_like(rows.p),
        "estimated mass": torch.sigmoid(rows.log_odds),
        "estimated mass, second order": torch.sigmoid(rows.log_odds_second_order),
        "true mass": rows.share,
        "one per head": fit_constant(fitted),
    }
    for knots in KNOTS:
        ratios[f"{knots} knots per head"] = hat_basis(rows.position, knots) @ fit_knots(fitted, knots)
    for name, odds in (("log_odds", "estimated"), ("log_odds_second_order", "second order")):
        for scale in (False, True):
            factor, offset = fit_correction(fitted, getattr(fitted, name), scale=scale)
            label = "factor and offset" if scale else "offset"
            ratios[f"{odds} mass, learned {label}"] = torch.sigmoid(factor * getattr(rows, name) + offset)
    ratios["best per row (bound)"] = (rows.p / rows.n.clamp_min(1e-30)).clamp(0, 1)
    return ratios
