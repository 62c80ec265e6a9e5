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

    logits: one (H, A) tensor per layer. precision: bit width that they were trained at.
    """
    known = router.sparsities if router.layers[0].alpha_logits is not None else ()
    sparsities = sorted({*known, sparsity})
    layers = []
    for index, (layer, own) in enumerate(zip(router.layers, logits, strict=True)):
        own = own.detach().float().to("cpu", copy=True)
        rows = [
            own if s == sparsity else torch.logit(router.ratio(index, s)).expand_as(own).clone() for s in sparsities
        ]
        layers.append(RouterLayer(layer.proj_q, layer.proj_k, torch.stack(rows)))
    return RouterWeights(
        tuple(layers),
        router.model_family,
        router.num_heads,
        router.head_dim,
        sparsities=tuple(sparsities),
        precision=precision,
        keep_diagonal=router.keep_diagonal,
    )
