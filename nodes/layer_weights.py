"""What the operator needs per layer: projections and ratios, on the device of the call, moved there once per run."""

import threading

import torch


class LayerWeights:
    """Router weights of one patched clone by layer and device. Used by several threads (MultiGPU)."""

    def __init__(self, settings, router, num_heads):
        self._settings = settings
        self._router = router
        self._num_heads = num_heads
        self._placed = {}
        self._lock = threading.Lock()

    def on_device(self, layer, device, sparsity):
        """(proj_q, proj_k, ratios for this sparsity), float32 or None each."""
        key = (layer, device, sparsity)
        with self._lock:
            if key not in self._placed:
                # not inference tensors: a training step may save them for its backward pass
                with torch.inference_mode(False), torch.no_grad():
                    self._placed[key] = tuple(
                        None if tensor is None else tensor.to(device, torch.float32, copy=True)
                        for tensor in self._of_layer(layer, sparsity)
                    )
            return self._placed[key]

    def clear(self):
        with self._lock:
            self._placed.clear()

    def _of_layer(self, layer, sparsity):
        alpha = None
        if self._settings.ratio_mode == "fixed":
            alpha = torch.full((self._num_heads,), self._settings.fixed_ratio)
        if self._router is None:
            return None, None, alpha
        if self._settings.ratio_mode == "learned":
            alpha = self._router.ratio(layer, sparsity)
        trained = self._router.layers[layer]
        return trained.proj_q, trained.proj_k, alpha


def router_notes(settings, router):
    """Sentences for the report where a run differs from what its router was trained for."""
    if router is None or not router.sparsities:
        return []
    trained = router.sparsities
    if min(trained) <= settings.sparsity <= max(trained):
        return []
    nearest = min(trained, key=lambda sparsity: abs(sparsity - settings.sparsity))
    note = (
        f"the router was trained for sparsity {', '.join(f'{s:g}' for s in trained)} and this run uses "
        f"{settings.sparsity:g}: the ratios trained for {nearest:g} are taken"
    )
    return [note]
