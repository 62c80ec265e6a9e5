"""Self-attention of a model whose LoRA is trained: SLA2 with trainable ratios, or dense, as its own teacher."""

import functools
from collections import Counter

import torch

from ...sla2_kernels.references import REFERENCE_KEYS
from ...sla2_training.ratios import logits_of_estimates, start_logits
from ..attention.call import check_supported
from ..attention.layer_weights import CallWeights
from ..attention.model_call import CALL, LAYER
from ..attention.patching import install_dense
from ..attention.run_dense import RunDense
from ..attention.sparse_call import leaves_out, rows_below, sparse_request, with_dense_rows


class LoraAttention:
    """Computes every marked self-attention call of a model that is trained. Holds no reference to the model.

    router: RouterWeights. sparsity, precision: as in sla2_attention. device: of the model. needs_start: True until
    start_ratios() where layers have no learned ratios; their calls estimate them.
    ratio_logits: trainable, (H, A) float32 per layer. dense: whether calls run dense now. untrained: calls that could not
    run sparse, by reason.
    """

    def __init__(self, router, sparsity, precision, device):
        self.sparsity, self.precision = sparsity, precision
        self.dense = True
        self.sparse_calls, self.untrained = 0, Counter()
        self._keep_diagonal, self._query_block = router.keep_diagonal, router.q_block
        self._projections = [
            tuple(None if proj is None else proj.to(device, torch.float32, copy=True) for proj in (r.proj_q, r.proj_k))
            for r in router.layers
        ]
        starts = start_logits(router, sparsity)
        self._estimates = {layer: [] for layer, logits in enumerate(starts) if logits is None}
        self.needs_start = bool(self._estimates)
        self.ratio_logits = [
            torch.nn.Parameter((torch.zeros(router.num_heads, 1) if logits is None else logits).to(device))
            for logits in starts
        ]

    @torch.no_grad()
    def start_ratios(self):
        """Starts the ratios of layers that have learned none at what the calls so far estimated, where there were any."""
        for layer, seen in list(self._estimates.items()):
            if seen:
                self.ratio_logits[layer].copy_(logits_of_estimates(seen))
                del self._estimates[layer]
        self.needs_start = False

    def trained_logits(self):
        """ratio_logits, None for a layer that has no ratios: no call of it ran sparse, and the router has none."""
        return [None if layer in self._estimates else logits for layer, logits in enumerate(self.ratio_logits)]

    def install(self, model, layers):
        """A clone of ``model`` whose ``layers`` self-attention layers run through this."""
        return install_dense(model, layers, self._override)

    def _override(self, base):
        def sla2_lora_override(func, *args, **kwargs):
            below = func if base is None else functools.partial(base, func)
            options = kwargs.get("transformer_options") or {}
            if self.dense or options.get(CALL) is None or options.get(LAYER) is None:
                return below(*args, **kwargs)
            return self._attend(options[CALL], options[LAYER], below, args, kwargs)

        return sla2_lora_override

    def _attend(self, call, layer, below, args, kwargs):
        """One self-attention call, sparse as in SLA2 Apply Attention; one that cannot be is counted and runs dense."""
        try:
            request, exact = call.read(args, kwargs)
            self._check(request, exact)
        except RunDense as found:
            reason = found.reason
        else:
            return self._attend_sparse(call, layer, request, exact, below, args, kwargs)
        if not call.repeated:
            self.untrained[reason] += 1
        return below(*args, **kwargs)

    def _attend_sparse(self, call, layer, request, exact, below, args, kwargs):
        ratio = None if layer in self._estimates else torch.sigmoid(self.ratio_logits[layer])
        as_trained = {"keep_diagonal": self._keep_diagonal, "query_block": self._query_block}
        weights = CallWeights(*self._projections[layer], ratio, **as_trained)
        options = {"sparsity": self.sparsity, "precision": self.precision, "reference_keys": REFERENCE_KEYS[0]}
        out, row_ratio, *_ = sparse_request(request, exact, weights, **options)
        if ratio is None and self.needs_start:
            self._estimates[layer].append(row_ratio)
        if not call.repeated:
            self.sparse_calls += 1
        return with_dense_rows(out, request, exact, rows_below(below, args, kwargs))

    def _check(self, request, exact):
        """Raises RunDense where the call cannot run sparse, or would keep everything."""
        if not leaves_out(request, exact, self.sparsity, self._keep_diagonal):
            raise RunDense(
                f"the video is so short ({request.key_tokens} tokens) that sparsity {self.sparsity:g} keeps all of it"
            )
        check_supported(request, self.precision)
