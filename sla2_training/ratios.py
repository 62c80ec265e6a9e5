"""Mixing ratios that are trained by gradient: where they start, and the router that carries them afterwards."""

import torch

from ._kernels import RouterLayer, RouterWeights

ESTIMATE_RANGE = 0.02, 0.98


def start_logits(router, sparsity):
    """Ratio logits (H, A) of every layer at ``sparsity``, as the router learned them; None each where it has none."""
    ratios = (router.ratio(layer, sparsity) for layer in range(router.num_layers))
    return [None if ratio is None else torch.logit(ratio) for ratio in ratios]


def logits_of_estimates(estimates):
    """Ratio logits (H, 1) of the ratios (B, H, N) that the operator estimated in some calls of one layer."""
    ratio = torch.stack([estimate.mean(dim=(0, 2)) for estimate in estimates]).mean(dim=0)
    return torch.logit(ratio.clamp(*ESTIMATE_RANGE))[:, None]


def with_trained_ratios(router, logits, sparsity, precision):
    """``router`` with other ratios at ``sparsity``; its projections and its ratios at other sparsities stay.

    logits: one (H, A) tensor per layer, or None where nothing was trained: such a layer stays as it was. A layer that had no
    ratios before takes the trained ones at every sparsity. precision: that they were trained at.
    """
    had_ratios = any(layer.alpha_logits is not None for layer in router.layers)
    sparsities = sorted({*(router.sparsities if had_ratios else ()), sparsity})
    layers = (
        RouterLayer(layer.proj_q, layer.proj_k, _rows(router, index, own, sparsity, sparsities))
        for index, (layer, own) in enumerate(zip(router.layers, logits, strict=True))
    )
    return RouterWeights(
        tuple(layers),
        router.model_family,
        router.num_heads,
        router.head_dim,
        sparsities=tuple(sparsities),
        precision=precision,
        keep_diagonal=router.keep_diagonal,
        q_block=router.q_block,
    )


def _rows(router, layer, own, sparsity, sparsities):
    """Ratio logits (S, H, A) of a layer, ``own`` at ``sparsity``; None where it has none, old or new."""
    own = None if own is None else own.detach().float().to("cpu", copy=True)
    rows = []
    for known in sparsities:
        ratio = None if known == sparsity and own is not None else router.ratio(layer, known)
        row = own if ratio is None else torch.logit(ratio)
        if row is None:
            return None
        rows.append(row if own is None else row.expand_as(own))
    return torch.stack(rows)
