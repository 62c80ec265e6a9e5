"""The forward pass in Triton: route all heads, then work through groups of heads in one reused workspace.

pools -> scores -> top-k -> unselected mass where no ratio was learned; then per group: pack K and V -> masked sums
-> linear branch -> sparse loop and the mix. Without a linear branch: pools -> scores -> top-k; pack -> sparse loop.
"""

import math
from dataclasses import dataclass

import torch

from .kernels import configs
from .kernels.fitted_ratio import FittedRatio
from .kernels.hopper import why_not_hopper_loop
from .kernels.launch import planned
from .kernels.linear_attention import linear_attention
from .kernels.masked_sum import masked_sum
from .kernels.pack import pack
from .kernels.pool import pool, smooth
from .kernels.score import project, scores
from .kernels.select import mask_width, select, unselected_mask
from .kernels.sparse_attention import sparse_attention
from .kernels.unselected_mass import unselected_mass
from .kernels.weighted_mask import weighted_mask
from .loops import HOPPER, TRITON, took_loop
from .router import K_BLOCK, Q_BLOCK, block_count, selected_block_count
from .support import capability, interpreting, on_device

# Workspace of one head group, as a share of q's bytes: with routing's own buffers the peak stays below 1.5 times q.
WORKSPACE_SHARE = 1.4


@dataclass
class Routing:
    """Which key blocks each query block leaves to the linear branch, and K's pools: flat over batch x head.

    None: what a call does not need.
    """

    unselected: torch.Tensor | None = None  # 1 - M_c, (B * H, T_m, T_n)
    k_means: torch.Tensor | None = None  # (B * H, T_n, D), the block means of smoothed K in q's dtype
    k_mean: torch.Tensor | None = None  # float32 (B * H, D)


@dataclass
class Workspace:
    """What one group of heads needs of K and V; fields that a precision does not use are None."""

    k_low: torch.Tensor | None = None
    k_scale: torch.Tensor | None = None
    v_low: torch.Tensor | None = None
    v_exponent: torch.Tensor | None = None
    sums: torch.Tensor | None = None  # h_j: the first D * D of (G, T_n, >= D * D)
    norms: torch.Tensor | None = None  # z_j: (G, T_n, D), where not in FP8 the last row of sums
    query_sums: torch.Tensor | None = None  # (G, T_m, (D + 1) * D): H_i and Z_i
    # where h_j is in FP8:
    query_norms: torch.Tensor | None = None  # Z_i: (G, T_m, D), the last row of query_sums
    sums_exponent: torch.Tensor | None = None  # float32 (G, T_n)
    weights: torch.Tensor | None = None  # (G, T_m, T_n padded): 1 - M_c times the blocks' powers of two
    weights_scale: torch.Tensor | None = None  # float32 (G,): what to multiply their products with


def _sums_dtype(q):
    """Format of the mask, h_j and H_i: q's, but bfloat16 for float16, which loses phi(K) below 6e-8.

    float32 instead in Triton's interpreter, which cannot multiply bfloat16.
    """
    if q.dtype == torch.float16:
        return torch.float32 if interpreting() else torch.bfloat16
    return q.dtype


def _pool_keys(k, dtype, plan=None):
    pooled = pool(k, K_BLOCK, plan)
    means = torch.empty_like(pooled, dtype=dtype)
    return pooled, means, smooth(pooled, k.shape[2], K_BLOCK, means, plan)


def _route(q, k, proj_q, proj_k, selected, dtype, plan=None, diagonal=None):
    """Fills ``selected``, int32 (B * H, T_m, n), ascending. dtype: of the mask, None makes none."""
    k_pooled, k_means, k_mean = _pool_keys(k, q.dtype, plan)
    q_routed, k_routed = project(pool(q, Q_BLOCK, plan), proj_q, plan), project(k_pooled, proj_k, plan)
    unselected = select(scores(q_routed, k_routed, plan, diagonal), k_pooled.shape[1], selected, dtype, plan)
    return Routing(unselected, k_means, k_mean)


def _new_selection(q, count):
    shape = q.shape[0] * q.shape[1], block_count(q.shape[2], Q_BLOCK), count
    return torch.empty(shape, dtype=torch.int32, device=q.device)


def _as_read(q, *weights):
    """Projections and ratios as the kernels read them; None stays None."""
    return [None if x is None else x.to(device=q.device, dtype=torch.float32).contiguous() for x in weights]


def route(q, k, proj_q, proj_k, count, diagonal=None):
    """Key blocks per query block, int32 (B, H, T_m, count), of q (B, H, N, D) and k (B, H, M, D)."""
    with on_device(q.device):
        selected = _new_selection(q, count)
        _route(q, k, *_as_read(q, proj_q, proj_k), selected, None, diagonal=diagonal)
        return selected.unflatten(0, q.shape[:2])


def _workspace_bytes_per_head(q, k, qk, pv, linear, low_sums):
    blocks, q_blocks, head_dim = block_count(k.shape[2], K_BLOCK), block_count(q.shape[2], Q_BLOCK), q.shape[3]
    low = blocks * K_BLOCK * head_dim * ((qk != "16bit") + (pv == "fp8"))
    if not linear:
        return low
    sum_bytes = (head_dim + 1) * head_dim * q.element_size()
    key_bytes = head_dim * (head_dim + q.element_size()) if low_sums else sum_bytes
    return low + blocks * key_bytes + q_blocks * (sum_bytes + blocks * low_sums)


def _head_groups(q, per_head):
    """Equal slices of the batch x heads, as few as WORKSPACE_SHARE allows: fixed by shapes, never by free memory."""
    total = q.shape[0] * q.shape[1]
    largest = max(1, int(WORKSPACE_SHARE * q.numel() * q.element_size() / max(per_head, 1)))
    size = math.ceil(total / math.ceil(total / largest))
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _allocate(q, k, group, qk, pv, linear, sums_dtype, low_sums):
    blocks, q_blocks, head_dim = block_count(k.shape[2], K_BLOCK), block_count(q.shape[2], Q_BLOCK), q.shape[3]
    fp8 = torch.float8_e4m3fn

    def empty(wanted, *shape, dtype=torch.float32):
        return torch.empty(group, *shape, dtype=dtype, device=q.device) if wanted else None

    square, rows = head_dim * head_dim, (head_dim + 1) * head_dim
    work = Workspace(
        k_low=empty(qk != "16bit", blocks, K_BLOCK, head_dim, dtype=torch.int8 if qk == "int8" else fp8),
        k_scale=empty(qk != "16bit", blocks),
        v_low=empty(pv == "fp8", blocks, head_dim, K_BLOCK, dtype=fp8),
        v_exponent=empty(pv == "fp8", blocks),
        query_sums=empty(linear, q_blocks, rows, dtype=sums_dtype),
    )
    if low_sums:
        work.sums, work.sums_exponent = empty(True, blocks, square, dtype=fp8), empty(True, blocks)
        work.norms, work.query_norms = empty(True, blocks, head_dim, dtype=sums_dtype), work.query_sums[..., square:]
        work.weights, work.weights_scale = empty(True, q_blocks, mask_width(blocks), dtype=fp8), empty(True)
    elif linear:
        work.sums = empty(True, blocks, rows, dtype=sums_dtype)
        work.norms = work.sums[..., square:]
    return work


@dataclass(frozen=True)
class Sample:
    """Query rows that a ratio per video and head is fitted on.

    rows: int32 (R,), R a power of two from 16; the first ``fitted`` of them decide the ratio. dense: float32
    (B, H, R, D), contiguous, to be filled with their dense attention.
    """

    rows: torch.Tensor
    fitted: int
    dense: torch.Tensor


def attention(
    q, k, v, proj_q, proj_k, key_blocks, ratios, out, *,
    sparsity, scale, precision, diagonal=None, linear_branch=True, sample=None,
):  # fmt: skip
    """Fills out (B, H, N, D), any stride; returns the ratio per query row (B, H, N) and the key blocks used.

    q: (B, H, N, D); k, v: (B, H, M, D); any stride. key_blocks: int32 (B, H, T_m, n), ascending, distinct and in range,
    or None to route. ratios: (H, T_m) or (B * H, T_m), or None to estimate them, or with a Sample to fit them on it; then
    a key block is left out of every row. diagonal: see kernels/score.py.
    """
    blocks, unselected = block_count(k.shape[2], K_BLOCK), None
    routing = key_blocks is None
    with on_device(q.device):
        proj_q, proj_k, ratios = _as_read(q, proj_q, proj_k, ratios)
        rows = dense = fitted = None
        if sample is not None:
            rows, dense, fitted = sample.rows, sample.dense, sample.fitted
            ratios = q.new_empty((q.shape[0] * q.shape[1], block_count(q.shape[2], Q_BLOCK)), dtype=torch.float32)
        elif ratios is not None and len(ratios) == q.shape[1]:
            ratios = ratios.repeat(q.shape[0], 1)
        row_ratio = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        if routing:
            selected = _new_selection(q, selected_block_count(sparsity, blocks))
        else:
            selected = key_blocks.flatten(0, 1).contiguous()
        linear = linear_branch and selected.shape[2] < blocks
        if linear and not routing:
            unselected = unselected_mask(selected, blocks, _sums_dtype(q))
        card = capability(q.device)
        why_not_hopper = why_not_hopper_loop(card, *configs.loop_formats(precision, card), q, k, v)
        took_loop(HOPPER if why_not_hopper is None else TRITON, why_not_hopper)
        tensors = q, k, v, proj_q, proj_k, ratios, selected, unselected, row_ratio, out, rows, dense
        settings = scale, precision, diagonal, routing, linear, why_not_hopper is None, fitted
        planned(tensors, settings, lambda plan: _attend(*tensors, *settings, plan))
    return row_ratio, selected.unflatten(0, q.shape[:2])


def _attend(
    q, k, v, proj_q, proj_k, ratios, selected, unselected, row_ratio, out, rows, dense,
    scale, precision, diagonal, routing, linear, hopper, fitted, plan,
):  # fmt: skip
    """Fills row_ratio, out, ``selected`` where ``routing``, and ratios and dense where there are rows to fit on."""
    card, dtype = capability(q.device), _sums_dtype(q)
    qk, pv = configs.loop_formats(precision, card)
    if routing:
        routed = _route(q, k, proj_q, proj_k, selected, dtype if linear else None, plan, diagonal)
    elif linear or qk != "16bit":
        routed = Routing(unselected, *_pool_keys(k, q.dtype, plan)[1:])
    else:
        routed = Routing()
    low_sums = linear and hopper and pv == "fp8"
    groups = _head_groups(q, _workspace_bytes_per_head(q, k, qk, pv, linear, low_sums))
    work = _allocate(q, k, groups[0].stop, qk, pv, linear, dtype, low_sums)
    ratio = "none" if not linear else "estimated" if ratios is None else "learned"
    sizes = {"scale_log2": scale * math.log2(math.e), "q_block": Q_BLOCK, "block": K_BLOCK, "plan": plan}
    product = configs.product_config(card, q.element_size())
    branch = configs.linear_config(card, q.element_size())
    fit = None if rows is None else FittedRatio(Sample(rows, fitted, dense), ratios, Q_BLOCK, plan)
    if fit is not None:
        of_rows = configs.fit_config(q.element_size())
        fit.attend(q, k, v, routed.unselected, scale_log2=sizes["scale_log2"], block=K_BLOCK, config=of_rows)
    if ratio == "estimated":
        # waits where the loop will put the ratio
        mass = configs.mass_config(card, q.element_size())
        unselected_mass(q, routed, row_ratio, k.shape[2], smoothed=qk != "16bit", config=mass, **sizes)
    for heads in groups:
        pack(k, v, routed.k_mean, work, heads, K_BLOCK, qk, pv, plan, register_order=hopper and pv == "fp8")
        if low_sums:
            from .kernels.hopper_masked_sum import hopper_masked_sum

            weighted_mask(routed.unselected, work, heads, plan)
            hopper_masked_sum(work, heads, plan)
        elif linear:
            masked_sum(routed.unselected, work.sums, work.query_sums, heads, product, plan)
        if fit is not None:
            fit.fit(q, work.query_sums, heads, register_order=hopper and pv == "fp8")
        if linear and not hopper:
            linear_attention(q, work, out, ratios, row_ratio, heads, q_block=Q_BLOCK, config=branch, plan=plan)
        operands = q, k, v, out, work, selected
        if hopper:
            from .kernels.hopper_loop import hopper_sparse_attention

            hopper_sparse_attention(*operands, ratios, row_ratio, heads, ratio=ratio, qk=qk, **sizes)
        else:
            config = configs.loop_config(card, qk, pv, q.shape[3], q.element_size())
            sparse_attention(*operands, row_ratio, heads, ratio=ratio, qk=qk, pv=pv, config=config, **sizes)
