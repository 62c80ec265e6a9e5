"""The trainable part of one layer: router projections, ratio logits and their optimiser."""

import torch
import torch.nn.functional as F

from ._kernels import RouterLayer, resample_ratio


class LayerState:
    """proj_q, proj_k (D, D) or (H, D, D), from the identity; alpha_logits (S, H, A), None until they have a start value."""

    def __init__(self, layer, num_heads, head_dim, options):
        per_head = options.per_head or any(p is not None and p.dim() == 3 for p in (layer.proj_q, layer.proj_k))
        shape = (num_heads, head_dim, head_dim) if per_head else (head_dim, head_dim)
        self.proj_q, self.proj_k = (_projection(proj, shape) for proj in (layer.proj_q, layer.proj_k))
        self.alpha_logits = None if layer.alpha_logits is None else layer.alpha_logits.detach().clone()
        self.options = options
        self.optimizer = None

    def on(self, device):
        """Moves the parameters to ``device``; the optimiser starts anew where that changes anything."""
        if self.proj_q.device != device or self.optimizer is None:
            names = ("proj_q", "proj_k") if self.alpha_logits is None else ("proj_q", "proj_k", "alpha_logits")
            for name in names:
                setattr(self, name, getattr(self, name).detach().to(device).clone().requires_grad_(True))
            # the loss is relative to the output's energy, so its gradients may be far below Adam's usual epsilon
            self.optimizer = torch.optim.Adam(
                [{"params": [self.proj_q, self.proj_k], "lr": self.options.learning_rate}], eps=1e-12
            )
            if self.alpha_logits is not None:
                self._optimise_ratio()
        return self

    def start_ratio(self, ratio):
        """Sets the ratio's start value, ratio (S, H) in (0, 1); the knots begin equal."""
        logits = torch.logit(ratio.clamp(0.02, 0.98))[..., None].repeat(1, 1, self.options.knots)
        self.alpha_logits = logits.detach().clone().requires_grad_(True)
        self._optimise_ratio()

    def _optimise_ratio(self):
        self.optimizer.add_param_group({"params": [self.alpha_logits], "lr": self.options.ratio_learning_rate})

    def ratios(self, query_block_count):
        """(S, H, T_m) ratios, with gradient."""
        return torch.stack([resample_ratio(torch.sigmoid(a), query_block_count) for a in self.alpha_logits])

    def weights(self):
        """The RouterLayer as it stands, float32 on the CPU."""
        copies = (
            None if t is None else t.detach().to("cpu", copy=True)
            for t in (self.proj_q, self.proj_k, self.alpha_logits)
        )
        return RouterLayer(*copies)


def _projection(proj, shape):
    if proj is None:
        return torch.eye(shape[-1]).expand(shape).clone()
    return proj.detach().float().expand(shape).clone()


def resumed_layer(router, layer, sparsities, knots):
    """A layer of a RouterWeights with its logits brought to these sparsities and knots: what a training resumes from."""
    old = router.layers[layer]
    if old.alpha_logits is None:
        return old
    logits = torch.stack([_logits_at(router, layer, sparsity) for sparsity in sparsities])
    if logits.shape[-1] != knots:
        logits = F.interpolate(logits, size=knots, mode="linear", align_corners=True)
    return RouterLayer(old.proj_q, old.proj_k, logits)


def _logits_at(router, layer, sparsity):
    if sparsity in router.sparsities:
        return router.layers[layer].alpha_logits[router.sparsities.index(sparsity)]
    return torch.logit(router.ratio(layer, sparsity))
