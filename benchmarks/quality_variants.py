"""What quality.py compares: each variant replaces dense self-attention, layer by layer."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from sla2_kernels import K_BLOCK, sla2_attention
from sla2_kernels.router import block_count, selected_block_count

from .rivals import fitted_sla, pooled_tail, sol_attn

DENSE = "dense"
UNTRAINED = "SLA2 untrained (heuristic router, own key blocks kept, estimated ratio)"
STAGE_1 = "SLA2 stage 1 (learned router, learned ratio)"
HEURISTIC = "heuristic router, learned ratio"
ESTIMATED = "learned router, estimated ratio"
ROUTER_ONLY = "learned router, no linear branch"
BLOCK_SPARSE = "block-sparse: heuristic router, no linear branch (SLA v1 with its initial proj_l = 0)"
FREE = "heuristic router that need not keep own key blocks, estimated ratio"
POOLED = "heuristic router, pooled-value tail instead of the linear branch"
V1_IDENTITY = "SLA v1, proj_l = identity"
V1_FITTED = "SLA v1, proj_l fitted to the training captures"
SOL = "sol_attn, top-k with pooled tail"
SOL_EQUAL = "sol_attn, as many blocks in all"


@dataclass(frozen=True)
class Variant:
    """attend(layer, q, k, v) -> out, all (B, N, H, D). kept(q, k): share of key blocks computed exactly."""

    name: str
    attend: Callable
    sparsity: float | None = None
    precision: str | None = None
    kept: Callable = field(default=lambda q, k: 1.0)

    def __call__(self, layer, q, k, v):
        # the variants choose their own precision; autocast would change it
        with torch.autocast(q.device.type, enabled=False):
            return self.attend(layer, q, k, v)


def dense(layer, q, k, v):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def _share(sparsity, q, k):
    blocks = block_count(k.shape[1], K_BLOCK)
    return selected_block_count(sparsity, blocks) / blocks


def _sla2(name, sparsity, precision, router, learned_ratio, keep_diagonal=True):
    """router None: the heuristic one, with ``keep_diagonal``; else the router says whether it keeps the diagonal."""

    def attend(layer, q, k, v):
        proj_q = proj_k = alpha = None
        kept = keep_diagonal
        if router is not None:
            kept = router.keep_diagonal
            weights = router.layers[layer]
            proj_q, proj_k = _on(q.device, weights.proj_q), _on(q.device, weights.proj_k)
            alpha = _on(q.device, router.ratio(layer, sparsity)) if learned_ratio else None
        options = {"sparsity": sparsity, "precision": precision, "layout": "BNHD", "keep_diagonal": kept}
        return sla2_attention(q, k, v, proj_q, proj_k, alpha, **options)

    return Variant(name, attend, sparsity, precision, functools.partial(_share, sparsity))


def _on(device, tensor):
    return None if tensor is None else tensor.to(device)


def _router_only(sparsity, router):
    def attend(layer, q, k, v):
        weights = router.layers[layer]
        proj_q, proj_k = _on(q.device, weights.proj_q), _on(q.device, weights.proj_k)
        return fitted_sla.sparse_branch(q, k, v, sparsity, proj_q, proj_k, router.keep_diagonal)

    return Variant(ROUTER_ONLY, attend, sparsity, "16bit", functools.partial(_share, sparsity))


def _block_sparse(sparsity):
    def attend(layer, q, k, v):
        return fitted_sla.sparse_branch(q, k, v, sparsity)

    return Variant(BLOCK_SPARSE, attend, sparsity, "16bit", functools.partial(_share, sparsity))


def _pooled(sparsity):
    def attend(layer, q, k, v):
        return pooled_tail.attention(q, k, v, sparsity)

    return Variant(POOLED, attend, sparsity, "16bit", functools.partial(_share, sparsity))


def _v1(name, sparsity, projection_of):
    def attend(layer, q, k, v):
        return fitted_sla.attention(q, k, v, sparsity, projection_of(layer, q))

    return Variant(name, attend, sparsity, "16bit", functools.partial(_share, sparsity))


def _sol(name, function, sparsity, count_of):
    def attend(layer, q, k, v):
        blocks = block_count(k.shape[1], sol_attn.BLOCK)
        return function(q, k, v, topk_ratio=count_of(q, k) / blocks)

    return Variant(name, attend, sparsity, None, lambda q, k: sol_attn.kept_share(q, k, count_of(q, k)))


def fit_v1(captures_by_layer, sparsities):
    """{(layer, sparsity): Projection} fitted to training captures."""
    return {
        (layer, sparsity): fitted_sla.fit_projection(captures, sparsity)
        for layer, captures in captures_by_layer.items()
        for sparsity in sparsities
    }


def make_variants(sparsities, precisions, stage_1, heuristic, projections):
    """(variants, {absent variant: why}).

    stage_1: RouterWeights of stage 1. heuristic: RouterWeights with identity projections and trained ratios.
    projections: of fit_v1(). precisions: those of the stage-1 rows; every other row is 16 bit.
    """
    absent = {}
    try:
        sol_function = sol_attn.load()
    except ImportError as error:
        absent[SOL] = str(error)
        sol_function = None
    variants = [Variant(DENSE, dense)]
    for sparsity in sparsities:
        variants += [_sla2(STAGE_1, sparsity, precision, stage_1, True) for precision in precisions]
        variants += [
            _sla2(UNTRAINED, sparsity, "16bit", None, False),
            _sla2(HEURISTIC, sparsity, "16bit", heuristic, True),
            _sla2(ESTIMATED, sparsity, "16bit", stage_1, False),
            _router_only(sparsity, stage_1),
            _block_sparse(sparsity),
            _sla2(FREE, sparsity, "16bit", None, False, keep_diagonal=False),
            _pooled(sparsity),
            _v1(V1_IDENTITY, sparsity, lambda layer, q: fitted_sla.identity_projection(q.shape[-1], q.device)),
            _v1(V1_FITTED, sparsity, lambda layer, q, s=sparsity: projections[layer, s]),
        ]
        if sol_function is not None:
            asked = functools.partial(_asked_count, sparsity)
            equal = functools.partial(_equal_count, sparsity)
            variants += [_sol(SOL, sol_function, sparsity, asked), _sol(SOL_EQUAL, sol_function, sparsity, equal)]
    return variants, absent


def _asked_count(sparsity, q, k):
    return selected_block_count(sparsity, block_count(k.shape[1], sol_attn.BLOCK))


def _equal_count(sparsity, q, k):
    return sol_attn.equal_count(q, k, _share(sparsity, q, k))
