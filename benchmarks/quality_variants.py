"""What quality.py compares: each variant replaces dense self-attention, layer by layer."""

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from sla2_kernels import K_BLOCK, sla2_attention
from sla2_kernels.fitted_attention import fitted_attention, sample_rows
from sla2_kernels.query_blocks import default_query_block
from sla2_kernels.router import block_count, selected_block_count

from .rivals import fitted_sla, pooled_tail, sol_attn

DENSE = "dense"
UNTRAINED = "SLA2 untrained (heuristic router, own key blocks kept, estimated ratio)"
FITTED = "SLA2 untrained (heuristic router, own key blocks kept, ratio fitted in the run)"
ROUTER_FITTED = "SLA2 with a learned router, ratio fitted in the run"
OTHER_CARDS = "; 128 queries per selection, as on cards other than Hopper"
FINE = "; trained with 128 queries per selection, used with 64"
STAGE_1 = "SLA2 stage 1 (learned router, learned ratio)"
STAGE_2 = "SLA2 stage 2 (with its LoRA and ratios)"
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
SOL_TAU = "sol_attn, tau 1.3"

SHORT_RUN, EVERY = 8, 4  # when the node fits a ratio: nodes/runs/fitted_ratios.py


@dataclass(frozen=True)
class Variant:
    """attend(layer, q, k, v) -> out, all (B, N, H, D). kept(q, k): share of key blocks computed exactly, None where unknown.
    begin(steps, halves): called before the calls of one video, or with (None, 1) before calls that have nothing to do with
    each other."""

    name: str
    attend: Callable
    sparsity: float | None = None
    precision: str | None = None
    kept: Callable = field(default=lambda q, k: 1.0)
    begin: Callable = field(default=lambda steps, halves: None)

    def __call__(self, layer, q, k, v):
        # the variants choose their own precision; autocast would change it
        with torch.autocast(q.device.type, enabled=False):
            return self.attend(layer, q, k, v)


def dense(layer, q, k, v):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def _share(sparsity, q, k):
    blocks = block_count(k.shape[1], K_BLOCK)
    return selected_block_count(sparsity, blocks) / blocks


def sla2(name, sparsity, precision, router, learned_ratio, keep_diagonal=True, query_block=None):
    """router None: the heuristic one, with ``keep_diagonal``; else the router says. query_block None: as the node chooses, or a router's own."""

    def attend(layer, q, k, v):
        proj_q = proj_k = alpha = None
        kept = keep_diagonal if router is None else router.keep_diagonal
        block = query_block or (default_query_block(q, precision) if router is None else router.q_block)
        if router is not None:
            weights = router.layers[layer]
            proj_q, proj_k = _on(q.device, weights.proj_q), _on(q.device, weights.proj_k)
            alpha = _on(q.device, router.ratio(layer, sparsity)) if learned_ratio else None
        options = {"sparsity": sparsity, "precision": precision, "layout": "BNHD", "keep_diagonal": kept}
        return sla2_attention(q, k, v, proj_q, proj_k, alpha, query_block=block, **options)

    return Variant(name, attend, sparsity, precision, functools.partial(_share, sparsity))


class _Fitted:
    """A ratio per head that is fitted as the node does it: in a long run in every fourth call of a layer and half of guidance,
    the calls between take it over; else in every call. router: whose selection it is, None for the heuristic one."""

    def __init__(self, sparsity, precision, query_block, router):
        self.options = {"sparsity": sparsity, "precision": precision, "layout": "BNHD"}
        self.options["keep_diagonal"] = router is None or router.keep_diagonal
        self.query_block, self.router = query_block, router
        self.begin(None, 1)

    def projections(self, layer, device):
        if self.router is None:
            return None, None
        weights = self.router.layers[layer]
        return _on(device, weights.proj_q), _on(device, weights.proj_k)

    def begin(self, steps, halves):
        self.halves, self.every = halves, 1 if steps is None or steps <= SHORT_RUN else EVERY
        self.calls, self.ratios = Counter(), {}

    def __call__(self, layer, q, k, v):
        turn, half = divmod(self.calls[layer], self.halves)
        self.calls[layer] += 1
        block = self.query_block or default_query_block(q, self.options["precision"])
        inputs = (q, k, v, *self.projections(layer, q.device))
        if turn % self.every:
            return sla2_attention(*inputs, self.ratios[layer, half], query_block=block, **self.options)
        rows = sample_rows(q.shape[1], 1000 * self.calls[layer] + layer, q.device)
        fit = fitted_attention(*inputs, rows=rows, query_block=block, **self.options)
        self.ratios[layer, half] = fit.ratio.mean(dim=0)
        return fit.out


def fitted(sparsity, precision, name=FITTED, query_block=None, router=None):
    """query_block: None, as the node chooses without a router; a router's own with one."""
    run = _Fitted(sparsity, precision, router.q_block if router else query_block, router)
    return Variant(name, run, sparsity, precision, functools.partial(_share, sparsity), run.begin)


def _on(device, tensor):
    return None if tensor is None else tensor.to(device)


def _router_only(sparsity, router):
    def attend(layer, q, k, v):
        weights = router.layers[layer]
        proj_q, proj_k = _on(q.device, weights.proj_q), _on(q.device, weights.proj_k)
        own = {"keep_diagonal": router.keep_diagonal, "query_block": router.q_block}
        return fitted_sla.sparse_branch(q, k, v, sparsity, proj_q, proj_k, **own)

    return Variant(ROUTER_ONLY, attend, sparsity, "16bit", functools.partial(_share, sparsity))


def block_sparse(sparsity, precision="16bit"):
    def attend(layer, q, k, v):
        return fitted_sla.sparse_branch(q, k, v, sparsity, precision=precision)

    return Variant(BLOCK_SPARSE, attend, sparsity, precision, functools.partial(_share, sparsity))


def _pooled(sparsity):
    def attend(layer, q, k, v):
        return pooled_tail.attention(q, k, v, sparsity)

    return Variant(POOLED, attend, sparsity, "16bit", functools.partial(_share, sparsity))


def v1(name, sparsity, projection_of):
    def attend(layer, q, k, v):
        return fitted_sla.attention(q, k, v, sparsity, projection_of(layer, q))

    return Variant(name, attend, sparsity, "16bit", functools.partial(_share, sparsity))


def _sol(name, function, sparsity, count_of):
    def attend(layer, q, k, v):
        blocks = block_count(k.shape[1], sol_attn.BLOCK)
        return function(q, k, v, topk_ratio=count_of(q, k) / blocks)

    return Variant(name, attend, sparsity, None, lambda q, k: sol_attn.kept_share(q, k, count_of(q, k)))


def compiled_sol(name, sparsity, **options):
    """sol_attn as ComfyUI calls it, comfy-kitchen's compiled one; ImportError where that cannot run.

    options: topk_ratio or tau. What it keeps with tau it does not say.
    """
    function = sol_attn.load_compiled()

    def attend(layer, q, k, v):
        return function(q.contiguous(), k.contiguous(), v.contiguous(), **options)

    def kept(q, k):
        blocks = block_count(k.shape[1], sol_attn.BLOCK)
        return sol_attn.kept_share(q, k, int(options["topk_ratio"] * blocks)) if "topk_ratio" in options else None

    return Variant(name, attend, sparsity, None, kept)


def equal_topk_ratio(sparsity, calls):
    """The largest topk_ratio with which sol_attn keeps no more key blocks in all than SLA2; at least one block.

    calls: [(q, k), ...], (B, N, H, D), over which its share is averaged.
    """
    blocks = block_count(calls[0][1].shape[1], sol_attn.BLOCK)
    most = selected_block_count(sparsity, block_count(calls[0][1].shape[1], K_BLOCK))
    for count in range(most, 1, -1):
        shares = [sol_attn.kept_share(q, k, count) for q, k in calls]
        if sum(shares) / len(shares) <= _share(sparsity, *calls[0]):
            break
    else:
        count = 1
    # its count rounds down, so a little more than the share of whole blocks
    return (count + 0.01) / blocks


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
        variants += [sla2(STAGE_1, sparsity, precision, stage_1, True) for precision in precisions]
        variants += [
            sla2(UNTRAINED, sparsity, "16bit", None, False),
            sla2(HEURISTIC, sparsity, "16bit", heuristic, True),
            sla2(ESTIMATED, sparsity, "16bit", stage_1, False),
            _router_only(sparsity, stage_1),
            block_sparse(sparsity),
            sla2(FREE, sparsity, "16bit", None, False, keep_diagonal=False),
            _pooled(sparsity),
            v1(V1_IDENTITY, sparsity, lambda layer, q: fitted_sla.identity_projection(q.shape[-1], q.device)),
            v1(V1_FITTED, sparsity, lambda layer, q, s=sparsity: projections[layer, s]),
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
