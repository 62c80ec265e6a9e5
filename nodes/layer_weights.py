"""What the operator needs per layer: projections and ratios, on the device of the call, moved there once per run."""

import threading
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class CallWeights:
    """float32 tensors or None. linear_branch: SLA2's own; without it proj_l is SLA v1's (weight, bias), None: top-k only."""

    proj_q: torch.Tensor | None = None
    proj_k: torch.Tensor | None = None
    alpha: torch.Tensor | None = None
    proj_l: tuple[torch.Tensor, torch.Tensor] | None = None
    linear_branch: bool = True
    keep_diagonal: bool = False


class LayerWeights:
    """Weights of one patched clone by layer and device; trained ratios also by sparsity. Used by several threads (MultiGPU)."""

    def __init__(self, settings, router, num_heads, sla_weights=None):
        self._settings = settings
        self._router = router
        self._num_heads = num_heads
        self._sla_weights = sla_weights
        self._placed = {}
        self._lock = threading.Lock()

    def on_device(self, layer, device, sparsity):
        """CallWeights of a call of this layer at this sparsity."""
        with self._lock:
            weights = self._once(self._of_layer, layer, device)
            # apart: projections are large, and the same at every sparsity of a schedule
            return self._once(self._with_ratio, layer, device, sparsity) if self._ratio_is_trained else weights

    def _once(self, make, *key):
        if key not in self._placed:
            # not inference tensors: a training step may save them for its backward pass
            with torch.inference_mode(False), torch.no_grad():
                self._placed[key] = make(*key)
        return self._placed[key]

    def clear(self):
        with self._lock:
            self._placed.clear()

    @property
    def _ratio_is_trained(self):
        """Whether alpha is the router's, at the call's sparsity."""
        mixes = self._sla_weights is None and self._settings.method != "top-k only"
        return mixes and self._router is not None and self._settings.ratio_mode == "learned"

    def _with_ratio(self, layer, device, sparsity):
        return replace(self._placed[layer, device], alpha=_placed(self._router.ratio(layer, sparsity), device))

    def _of_layer(self, layer, device):
        """CallWeights but for a trained ratio."""
        if self._sla_weights is not None:
            proj_l = tuple(_placed(tensor, device) for tensor in self._sla_weights.layers[layer])
            return CallWeights(proj_l=proj_l, linear_branch=False)
        proj_q = proj_k = alpha = None
        if self._router is not None:
            router_layer = self._router.layers[layer]
            proj_q, proj_k = _placed(router_layer.proj_q, device), _placed(router_layer.proj_k, device)
        if self._settings.method == "top-k only":
            return CallWeights(proj_q, proj_k, linear_branch=False)
        keep_diagonal = self._router is None or self._router.keep_diagonal
        if self._settings.ratio_mode == "fixed":
            if self._settings.fixed_ratio == 1:  # nothing is mixed in
                return CallWeights(proj_q, proj_k, linear_branch=False, keep_diagonal=keep_diagonal)
            alpha = torch.full((self._num_heads,), self._settings.fixed_ratio, device=device)
        return CallWeights(proj_q, proj_k, alpha, keep_diagonal=keep_diagonal)


def _placed(tensor, device):
    return None if tensor is None else tensor.to(device, torch.float32, copy=True)


def router_notes(settings, router, sla_weights=None):
    """Sentences for the report where a run differs from what its weights were trained for."""
    if sla_weights is not None:
        unused = "the SLA weights were trained with their own simple router: the connected router is not used"
        return [unused] if router is not None else []
    if router is None:
        return []
    return [note for note in (_sparsity_note(settings, router), _precision_note(settings, router)) if note]


def _sparsity_note(settings, router):
    trained = router.sparsities
    used = settings.sparsities
    if not trained or not used or all(min(trained) <= sparsity <= max(trained) for sparsity in used):
        return None
    sparsity = next(sparsity for sparsity in used if not min(trained) <= sparsity <= max(trained))
    nearest = min(trained, key=lambda known: abs(known - sparsity))
    return (
        f"the router was trained for sparsity {', '.join(f'{s:g}' for s in trained)} and this run uses "
        f"{sparsity:g}: the ratios trained for {nearest:g} are taken"
    )


def _precision_note(settings, router):
    if router.precision is None or settings.bit_width in ("auto", router.precision):
        return None
    return f"the router was trained at {router.precision} and this run uses {settings.bit_width}"
