"""The trainable part of one layer: router projections, ratio logits and their optimiser."""

import torch
import torch.nn.functional as F

from ._kernels import RouterLayer, resample_ratio

RIDGE = 1e-4  # of the mean diagonal
RATIO_RANGE = 0.005, 0.995


class LayerState:
    """proj_q, proj_k (D, D) or (H, D, D), from the identity, trained by Adam; alpha_logits (S, H, A), by least squares.

    What is measured and saved are the projections' averages over the last steps: at a learning rate that learns fast they
    jump from step to step, and their averages do not (docs/ROUTER_DECISIONS.md).

    The output error is quadratic in the ratio, so the best ratios of all steps so far solve gram @ ratio = right, with
    gram (S, H, A, A) and right (S, H, A) summed over the steps, older ones fading. alpha_logits is None before the first.
    """

    def __init__(self, layer, num_heads, head_dim, options):
        per_head = options.per_head or any(p is not None and p.dim() == 3 for p in (layer.proj_q, layer.proj_k))
        shape = (num_heads, head_dim, head_dim) if per_head else (head_dim, head_dim)
        self.proj_q, self.proj_k = (_projection(proj, shape) for proj in (layer.proj_q, layer.proj_k))
        self.alpha_logits = None if layer.alpha_logits is None else layer.alpha_logits.detach().clone()
        self.gram = self.right = None
        self.averages, self.steps = None, 0
        self.options = options
        self.optimizer = None

    def on(self, device):
        """Moves the parameters to ``device``; the optimiser is then reset, unless they were there already."""
        if self.proj_q.device != device or self.optimizer is None:
            for name in ("proj_q", "proj_k"):
                setattr(self, name, getattr(self, name).detach().to(device).clone().requires_grad_(True))
            for name in ("alpha_logits", "gram", "right"):
                tensor = getattr(self, name)
                setattr(self, name, None if tensor is None else tensor.to(device))
            self.averages = None if self.averages is None else [average.to(device) for average in self.averages]
            # the loss is relative to the output's energy, so its gradients may be far below Adam's usual epsilon
            self.optimizer = torch.optim.Adam([self.proj_q, self.proj_k], lr=self.options.learning_rate, eps=1e-12)
        return self

    @torch.no_grad()
    def step(self):
        """An optimisation step of the projections with the gradients that lie in them."""
        self.optimizer.step()
        self.steps += 1
        projections = [self.proj_q.detach(), self.proj_k.detach()]
        if self.averages is None:
            self.averages = [projection.clone() for projection in projections]
            return
        # a short memory at first: the start does not linger
        memory = min(self.options.projection_memory, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.averages, projections, 1 - memory)

    def projections(self):
        """(proj_q, proj_k), detached, that the router has if the training ends here."""
        return self.averages or [self.proj_q.detach(), self.proj_k.detach()]

    def learn_ratio(self, gram, right):
        """Adds one step's equations, (S, H, A, A) and (S, H, A), and solves for the ratios."""
        memory = self.options.ratio_memory
        if self.gram is None:
            self.gram, self.right = torch.zeros_like(gram), torch.zeros_like(right)
            if self.alpha_logits is not None:
                # a resumed ratio counts as much as all the steps that a full memory holds
                self.gram = gram / (1 - memory)
                self.right = (self.gram @ torch.sigmoid(self.alpha_logits)[..., None])[..., 0]
        self.gram, self.right = memory * self.gram + gram, memory * self.right + right
        self.alpha_logits = solved_ratios(self.gram, self.right)

    def weights(self):
        """The RouterLayer as it stands, float32 on the CPU."""
        copies = (
            None if t is None else t.detach().to("cpu", copy=True) for t in (*self.projections(), self.alpha_logits)
        )
        return RouterLayer(*copies)


def solved_ratios(gram, right):
    """Ratio logits (S, H, A) that solve the equations gram (S, H, A, A) @ ratio = right (S, H, A)."""
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]
    tiny = torch.finfo(mean.dtype).tiny
    # knots that no step has covered yet stay near the mean of the others
    ridge = (RIDGE * mean).clamp_min(tiny)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    centre = right.sum(dim=-1) / gram.sum(dim=(-2, -1)).clamp_min(tiny)
    solved = torch.linalg.solve(gram + ridge * eye, right + ridge[..., 0] * centre[..., None])
    return torch.logit(solved.clamp(*RATIO_RANGE))


def ratios_of(alpha_logits, query_block_count):
    """(S, H, T_m) ratios of logits (S, H, A)."""
    return torch.stack([resample_ratio(torch.sigmoid(a), query_block_count) for a in alpha_logits])


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
