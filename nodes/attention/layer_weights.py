"""What the operator needs per layer: projections and ratios, on the device of the call, moved there once per run."""

import threading
from dataclasses import dataclass

import torch

from ...sla2_kernels import Q_BLOCK
from ...sla2_kernels.query_blocks import default_query_block
from ..compat.recording import lasting_tensors


@dataclass(frozen=True)
class CallWeights:
    """float32 tensors or None. linear_branch: SLA2's own; without it proj_l is SLA v1's (weight, bias), None: top-k only.

    fits: whether the ratio is fitted while the run samples, see fitted_ratios.py. query_block: query tokens per selection, None
    where default_query_block() decides.
    """

    proj_q: torch.Tensor | None = None
    proj_k: torch.Tensor | None = None
    ratio: torch.Tensor | None = None
    proj_l: tuple[torch.Tensor, torch.Tensor] | None = None
    linear_branch: bool = True
    keep_diagonal: bool = False
    fits: bool = False
    query_block: int | None = Q_BLOCK

    def query_block_of(self, q, precision):
        """Query tokens per selection of a call with these queries (..., D)."""
        return self.query_block or default_query_block(q, precision)


class LayerWeights:
    """Weights of one patched clone by layer, device and sparsity. Used by several threads (MultiGPU)."""

    def __init__(self, settings, router, num_heads, sla_weights=None):
        self._settings = settings
        self._router = router
        self._num_heads = num_heads
        self._sla_weights = sla_weights
        self._placed = {}  # by layer and device: its projections
        self._calls = {}
        self._lock = threading.Lock()

    def prepare(self, sparsities, device):
        """Moves the weights of a step's sparse layers to ``device``, outside of any model call. sparsities: by layer."""
        for layer, sparsity in sparsities.items():
            self.on_device(layer, device, sparsity)

    def on_device(self, layer, device, sparsity):
        """CallWeights of a call of this layer at this sparsity."""
        key = (layer, device, sparsity)
        with self._lock:
            if key not in self._calls:
                # kept, and a training step may save them for its backward pass
                with lasting_tensors():
                    self._calls[key] = self._of_call(layer, sparsity, device)
            return self._calls[key]

    def clear(self):
        with self._lock:
            self._placed.clear()
            self._calls.clear()

    def _of_call(self, layer, sparsity, device):
        projections = self._projections(layer, device)
        if self._sla_weights is not None:
            return CallWeights(proj_l=projections, linear_branch=False)
        ratio, untrained = None, self._router is None
        if self._settings.method == "top-k only":
            return CallWeights(
                *projections, linear_branch=False, query_block=Q_BLOCK if untrained else self._router.q_block
            )
        as_trained = {
            "keep_diagonal": untrained or self._router.keep_diagonal,
            "query_block": None if untrained else self._router.q_block,
        }
        if self._settings.ratio_mode == "fixed":
            if self._settings.fixed_ratio == 1:  # nothing of the linear branch would be mixed in
                return CallWeights(*projections, linear_branch=False, **as_trained)
            ratio = torch.full((self._num_heads,), self._settings.fixed_ratio)
        elif self._router is not None and self._settings.ratio_mode == "learned" and not self._settings.target_error:
            ratio = self._router.ratio(layer, sparsity)
        fits = ratio is None and self._settings.ratio_mode != "estimated"
        return CallWeights(*projections, placed(ratio, device), fits=fits, **as_trained)

    def _projections(self, layer, device):
        """What all sparsities of a layer share: SLA v1's (weight, bias), else the router's (proj_q, proj_k)."""
        if (layer, device) not in self._placed:
            weights = (None, None)
            if self._sla_weights is not None:
                weights = self._sla_weights.layers[layer]
            elif self._router is not None:
                weights = self._router.layers[layer].proj_q, self._router.layers[layer].proj_k
            self._placed[layer, device] = tuple(placed(tensor, device) for tensor in weights)
        return self._placed[layer, device]


def placed(tensor, device):
    """A float32 copy on ``device``; None stays None."""
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
    if router.precision is None or settings.precision in ("auto", router.precision):
        return None
    return f"the router was trained at {router.precision} and this run uses {settings.precision}"
