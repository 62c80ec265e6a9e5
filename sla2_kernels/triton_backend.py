"""The forward pass in Triton: route all heads, then work through groups of heads in one reused workspace.

pools -> scores -> top-k -> unselected mass where no ratio was learned; then per group: pack K and V -> masked sums
-> linear branch -> sparse loop and the mix. Without a linear branch: pools -> scores -> top-k; pack -> sparse loop.
On cards with mma.sync two groups run at a time, each in a workspace of its own: where one has too few programs left for the
whole card, the other's take their place.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .kernels import configs
from .kernels.fitted_ratio import FittedRatio
from .kernels.gluon_releases import gluon_is_known
from .kernels.hopper import why_not_hopper_loop
from .kernels.int8_attention import int8_sparse_attention, takes_linear_branch
from .kernels.int8_pack import int8_pack
from .kernels.launch import cached, lane, why_not_direct
from .kernels.linear_attention import linear_attention
from .kernels.masked_sum import int8_masked_sum, masked_sum
from .kernels.pack import HOPPER_GROUP, pack
from .kernels.pool import Pools, pools, smooth
from .kernels.product_order import GROUP as INT8_GROUP
from .kernels.score import INT32_MAX, INT32_MIN, project, scores
from .kernels.select import mask_width, select, unselected_mask
from .kernels.sparse_attention import sparse_attention
from .kernels.unselected_mass import unselected_mass
from .kernels.weighted_mask import BANDS, int8_weighted_mask, weighted_mask
from .loops import HOPPER, TRITON, took_loop
from .router import K_BLOCK, Q_BLOCK, block_count, selected_beside
from .support import capability, interpreting, on_device

MAX_SCORE, MIN_SCORE = INT32_MAX.value, INT32_MIN.value
# Workspace of the groups of heads that run at a time, as a share of q's bytes: with routing's own buffers the peak stays below
# 1.5 times q. At short lengths, where every launch counts, no less than a little of any card's memory.
WORKSPACE_SHARE = 1.4
WORKSPACE_FLOOR = 384 * 2**20


@dataclass
class Routing:
    """Which key blocks each query block leaves to the linear branch, and what follows from K's pools: flat over batch x head.

    None: what a call does not need.
    """

    unselected: torch.Tensor | None = None  # 1 - M_c, (B * H, T_m, T_n)
    k_means: torch.Tensor | None = None  # (B * H, T_n, D), the block means of smoothed K in q's dtype
    k_mean: torch.Tensor | None = None  # float32 (B * H, D)
    pools: Pools | None = None

    @property
    def balance(self):
        return None if self.pools is None else self.pools.balance

    @property
    def v_channel(self):
        return None if self.pools is None else self.pools.v_channel


@dataclass
class Workspace:
    """What one group of heads needs of K and V; fields that a call does not use are None."""

    packed_k: torch.Tensor | None = None  # K in 8 bit, (G, T_n, 64, D)
    k_scale: torch.Tensor | None = None  # float32 (G, T_n)
    packed_v: torch.Tensor | None = None  # V in 8 bit, transposed, (G, T_n, D, 64)
    v_exponent: torch.Tensor | None = None  # float32 (G, T_n)
    sums: torch.Tensor | None = None  # h_j: the first D * D of (G, T_n, >= D * D)
    norms: torch.Tensor | None = None  # z_j: (G, T_n, D), where h_j is in 16 bit the last row of sums
    query_sums: torch.Tensor | None = None  # (G, T_m, (D + 1) * D): H_i and Z_i
    # where h_j is in 8 bit:
    query_norms: torch.Tensor | None = None  # Z_i: (G, T_m, D), the last row of query_sums
    sums_exponent: torch.Tensor | None = None  # float32 (G, T_n)
    # 1 - M_c times the blocks' powers of two, (G, T_m, T_n padded), in INT8 (G, BANDS, T_m, T_n padded)
    weights: torch.Tensor | None = None
    weights_scale: torch.Tensor | None = None  # float32 (G,): what to multiply their products with
    bands: torch.Tensor | None = None  # int32 (G,): how many of INT8's bands a head needs


def _sums_dtype(q):
    """Format of the mask, h_j and H_i: q's, but bfloat16 for float16, which loses phi(K) below 6e-8.

    float32 instead in Triton's interpreter, which cannot multiply bfloat16.
    """
    if q.dtype == torch.float16:
        return torch.float32 if interpreting() else torch.bfloat16
    return q.dtype


def _smoothed(found, k, dtype):
    """Smooths the K of ``found`` (Pools); returns (its block means in ``dtype``, its mean)."""
    means = torch.empty_like(found.k, dtype=dtype)
    return means, smooth(found.k, k.shape[2], means)


def _route(q, k, v, proj_q, proj_k, selected, dtype, query_block, diagonal=None, forced=(0, 0), **samples):
    """Fills ``selected``, int32 (B * H, T_m, n), ascending. dtype: of the mask, None makes none. samples: as in pools()."""
    found = pools(k, q, v, query_block=query_block, **samples)
    means, mean = _smoothed(found, k, q.dtype)
    q_routed, k_routed = project(found.q, proj_q), project(found.k, proj_k)
    unselected = select(scores(q_routed, k_routed, query_block, diagonal, forced), found.k.shape[1], selected, dtype)
    return Routing(unselected, means, mean, found)


def _new_selection(q, query_block, count):
    shape = q.shape[0] * q.shape[1], block_count(q.shape[2], query_block), count
    return torch.empty(shape, dtype=torch.int32, device=q.device)


def _as_read(q, *weights):
    """Projections as the kernels read them; None stays None."""
    return [None if x is None else x.to(device=q.device, dtype=torch.float32).contiguous() for x in weights]


def _per_head(block_ratio, batch_heads):
    """float32 ratios (H, T_m) or (B * H, T_m) as the kernels read them: contiguous (B * H, T_m)."""
    times = batch_heads // len(block_ratio)
    return block_ratio.contiguous() if times == 1 else block_ratio.repeat(times, 1)


def route(q, k, proj_q, proj_k, count, diagonal=None, query_block=Q_BLOCK):
    """Key blocks per query block, int32 (B, H, T_m, count), of q (B, H, N, D) and k (B, H, M, D)."""
    with on_device(q.device):
        selected = _new_selection(q, query_block, count)
        _route(q, k, None, *_as_read(q, proj_q, proj_k), selected, None, query_block, diagonal)
        return selected.unflatten(0, q.shape[:2])


def route_pools(q_pooled, k_pooled, tokens, proj_q, proj_k, count, diagonal=None, query_block=Q_BLOCK):
    """route() of block means, float32 (B, H, T, D), those of the unsmoothed k with its number of tokens."""
    device, shape = q_pooled.device, q_pooled.shape[:2]
    with on_device(device):
        proj_q, proj_k = _as_read(q_pooled, proj_q, proj_k)
        q_pooled = q_pooled.flatten(0, 1).contiguous()
        smoothed = k_pooled.flatten(0, 1).clone(memory_format=torch.contiguous_format)
        smooth(smoothed, tokens)
        selected = torch.empty(*q_pooled.shape[:2], count, dtype=torch.int32, device=device)
        ranked = scores(project(q_pooled, proj_q), project(smoothed, proj_k), query_block, diagonal)
        select(ranked, smoothed.shape[1], selected, None)
        return selected.unflatten(0, shape)


def route_marked(q, k, proj_q, proj_k, count, always, raise_more, query_block=Q_BLOCK):
    """Key blocks per query block, int32 (B, H, T_m, count): those that ``always`` marks, bool (T_m or 1, T_n), and the best others.

    raise_more(scores, highest, lowest): raises more of the integer scores (B * H, T_m, T_n) to the highest, in place.
    """
    with on_device(q.device):
        selected = _new_selection(q, query_block, count)
        proj_q, proj_k = _as_read(q, proj_q, proj_k)
        found = pools(k, q, query_block=query_block)
        smooth(found.k, k.shape[2])
        marked = scores(project(found.q, proj_q), project(found.k, proj_k), query_block)
        valid = marked[..., : found.k.shape[1]]
        valid.masked_fill_(always, MAX_SCORE)
        raise_more(valid, MAX_SCORE, MIN_SCORE)
        select(marked, found.k.shape[1], selected, None)
        return selected.unflatten(0, q.shape[:2])


def _workspace_bytes_per_head(q, k, q_blocks, qk, pv, linear, low_sums):
    blocks, head_dim = block_count(k.shape[2], K_BLOCK), q.shape[3]
    packed = blocks * K_BLOCK * head_dim * ((qk != "16bit") + (pv != "16bit"))
    if not linear:
        return packed
    sum_bytes = (head_dim + 1) * head_dim * q.element_size()
    key_bytes = head_dim * (head_dim + q.element_size()) if low_sums else sum_bytes
    weight_bytes = (BANDS.value if pv == "int8" else 1) * blocks if low_sums else 0
    return packed + blocks * key_bytes + q_blocks * (sum_bytes + weight_bytes)


def _head_groups(q, per_head, lanes=1):
    """Slices of the batch x heads, as few as the workspace's limits allow with one group at a time in each lane, the first the
    largest by at most one head: fixed by shapes, never by free memory."""
    total = q.shape[0] * q.shape[1]
    allowed = max(WORKSPACE_SHARE * q.numel() * q.element_size(), WORKSPACE_FLOOR)
    largest = max(1, int(allowed / max(lanes * per_head, 1)))
    count = min(total, lanes * math.ceil(total / (lanes * largest)))
    ends = [math.ceil(total * number / count) for number in range(count + 1)]
    return list(map(slice, ends, ends[1:]))


def _lanes(device):
    """How many groups of heads run at a time where one workspace does not hold all heads."""
    # on an H200 two gain 1.5 to 2.6% in the instructions of an RTX 40 and, at 14B-720p, nothing in Hopper's own; launches that
    # are not replayed follow each other
    return 2 if configs.multiplies_by_mma_sync(capability(device)) and why_not_direct() is None else 1


def _in_lanes(q, per_head):
    """(slices of the batch x heads, how many of them run at a time): several where one head does not fill the workspace's limit, nor
    all heads fit."""
    groups, lanes = _head_groups(q, per_head), 1
    if len(groups) > 1 and groups[0].stop > 1:
        lanes = _lanes(q.device)
    return groups if lanes == 1 else _head_groups(q, per_head, lanes), lanes


def _allocate(q, k, q_blocks, group, qk, pv, linear, sums_dtype, low_sums):
    blocks, head_dim = block_count(k.shape[2], K_BLOCK), q.shape[3]
    fp8 = torch.float8_e4m3fn

    def empty(wanted, *shape, dtype=torch.float32):
        return torch.empty(group, *shape, dtype=dtype, device=q.device) if wanted else None

    square, rows = head_dim * head_dim, (head_dim + 1) * head_dim
    work = Workspace(
        packed_k=empty(qk != "16bit", blocks, K_BLOCK, head_dim, dtype=torch.int8 if qk == "int8" else fp8),
        k_scale=empty(qk != "16bit", blocks),
        packed_v=empty(pv != "16bit", blocks, head_dim, K_BLOCK, dtype=torch.int8 if pv == "int8" else fp8),
        v_exponent=empty(pv != "16bit", blocks),
        query_sums=empty(linear, q_blocks, rows, dtype=sums_dtype),
    )
    if low_sums:
        low = torch.int8 if pv == "int8" else fp8
        work.sums, work.sums_exponent = empty(True, blocks, square, dtype=low), empty(True, blocks)
        work.norms, work.query_norms = empty(True, blocks, head_dim, dtype=sums_dtype), work.query_sums[..., square:]
        bands = (BANDS.value,) if pv == "int8" else ()
        work.weights = empty(True, *bands, q_blocks, mask_width(blocks), dtype=low)
        work.weights_scale, work.bands = empty(True), empty(pv == "int8", dtype=torch.int32)
    elif linear:
        work.sums = empty(True, blocks, rows, dtype=sums_dtype)
        work.norms = work.sums[..., square:]
    return work


@dataclass(frozen=True)
class Sample:
    """Query rows that a ratio per video and head is fitted on.

    rows: int32 (R,), R a power of two from 16; the first ``fitted`` of them decide the ratio. To be filled, contiguous
    float32: dense (B, H, R, D), their dense attention; ratio (B, H).
    """

    rows: torch.Tensor
    fitted: int
    dense: torch.Tensor
    ratio: torch.Tensor


class _Tensors(NamedTuple):
    """The tensors of a call that its kernels read or fill.

    block_ratio: float32 (B * H, T_m), or None where it is estimated or fitted. row_ratio: float32 (B, H, N), to be filled. rows, dense,
    head_ratio: those of a Sample.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    proj_q: torch.Tensor | None
    proj_k: torch.Tensor | None
    block_ratio: torch.Tensor | None
    selected: torch.Tensor
    unselected: torch.Tensor | None
    row_ratio: torch.Tensor
    out: torch.Tensor
    rows: torch.Tensor | None
    dense: torch.Tensor | None
    head_ratio: torch.Tensor | None


class _Settings(NamedTuple):
    """What else decides which kernels a call launches. routing: whether it selects. linear: whether a block is left out.

    qk, pv: formats of the two products. hopper: whether the loop in Gluon runs. fitted: as in Sample, or None.
    query_block: query rows that share a selection.
    """

    scale: float
    qk: str
    pv: str
    diagonal: int | None
    forced: tuple[int, int]
    routing: bool
    linear: bool
    hopper: bool
    fitted: int | None
    query_block: int

    @property
    def low_sums(self):
        """Whether h_j is in 8 bit, in the format of V."""
        return self.linear and (self.pv == "int8" or (self.hopper and self.pv == "fp8"))

    @property
    def register_order(self):
        """Whether V and h_j are packed in the order of the Hopper loop's registers."""
        return self.hopper and self.pv == "fp8"

    def order_of_sums(self, head_dim):
        """How many of H_i's columns change places with each other; 0: none."""
        return HOPPER_GROUP if self.register_order else min(INT8_GROUP, head_dim) if self.pv == "int8" else 0


def attention(
    q, k, v, proj_q, proj_k, key_blocks, block_ratio, out, *,
    sparsity, scale, precision, diagonal=None, forced=(0, 0), linear_branch=True, sample=None, query_block=Q_BLOCK,
):  # fmt: skip
    """Fills out (B, H, N, D), any stride; returns the ratio per query row (B, H, N) and the key blocks used, (B * H, T_m, n).

    q: (B, H, N, D); k, v: (B, H, M, D); any stride. key_blocks: int32 (B, H, T_m, n), ascending, distinct and in range,
    or None to route. block_ratio: float32 (H, T_m) or (B * H, T_m), or None to estimate it, or with a Sample to fit it on that; then
    each query block leaves a key block out. diagonal, forced: see kernels/score.py; ``sparsity`` is of the key blocks that are not forced.
    """
    blocks, unselected = block_count(k.shape[2], K_BLOCK), None
    routing = key_blocks is None
    with on_device(q.device):
        proj_q, proj_k = _as_read(q, proj_q, proj_k)
        if block_ratio is not None:
            block_ratio = _per_head(block_ratio, q.shape[0] * q.shape[1])
        row_ratio = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        if routing:
            selected = _new_selection(q, query_block, selected_beside(forced, sparsity, blocks))
        else:
            selected = key_blocks.flatten(0, 1).contiguous()
        linear = linear_branch and selected.shape[2] < blocks
        if linear and not routing:
            unselected = unselected_mask(selected, blocks, _sums_dtype(q))
        card = capability(q.device)
        qk, pv = configs.loop_formats(precision, card)
        why_not_hopper = why_not_hopper_loop(card, qk, pv, q, k, v, query_block)
        took_loop(HOPPER if why_not_hopper is None else TRITON, why_not_hopper)
        sampled = (None, None, None) if sample is None else (sample.rows, sample.dense, sample.ratio)
        tensors = _Tensors(q, k, v, proj_q, proj_k, block_ratio, selected, unselected, row_ratio, out, *sampled)
        fitted = None if sample is None else sample.fitted
        settings = _Settings(
            scale, qk, pv, diagonal, forced, routing, linear, why_not_hopper is None, fitted, query_block
        )
        cached(tensors, settings, lambda: _attend(tensors, settings))
    return row_ratio, selected


def _attend(t, s):
    """Runs the kernels of a call (_Tensors, _Settings), group of heads after group of heads."""
    routed, q_blocks = _routing(t, s), t.selected.shape[1]
    per_head = _workspace_bytes_per_head(t.q, t.k, q_blocks, s.qk, s.pv, s.linear, s.low_sums)
    groups, lanes = _in_lanes(t.q, per_head)
    works = [
        _allocate(t.q, t.k, q_blocks, groups[0].stop, s.qk, s.pv, s.linear, _sums_dtype(t.q), s.low_sums)
        for _ in range(lanes)
    ]
    scale_log2, fit = s.scale * math.log2(math.e), None
    if t.rows is not None:
        t = t._replace(block_ratio=torch.empty(t.selected.shape[:2], dtype=torch.float32, device=t.q.device))
        fit = FittedRatio(Sample(t.rows, s.fitted, t.dense, t.head_ratio), t.block_ratio, s.query_block)
        config = configs.fit_config(capability(t.q.device), t.q.element_size())
        fit.attend(t.q, t.k, t.v, routed.unselected, scale_log2=scale_log2, config=config)
    if s.linear and t.block_ratio is None:
        # the log2 of the unselected mass waits where the loop will put the ratio
        config = configs.mass_config(capability(t.q.device), t.q.element_size(), s.query_block)
        unselected_mass(
            t.q, routed, t.row_ratio, t.k.shape[2], s.query_block,
            scale_log2=scale_log2, smoothed=s.qk != "16bit", config=config,
        )  # fmt: skip
    for number, group in enumerate(groups):
        with lane(number % lanes):
            _attend_group(t, s, works[number % lanes], routed, fit, group, scale_log2)


def _attend_group(t, s, work, routed, fit, group, scale_log2):
    """All that follows routing, for a group of heads."""
    if s.pv == "int8":
        int8_pack(t.k, t.v, routed.k_mean, work, group, balance=routed.balance, v_channel=routed.v_channel)
    else:
        options = {"balance": routed.balance, "register_order": s.register_order}
        pack(t.k, t.v, routed.k_mean, work, group, s.qk, s.pv, **options)
    if s.linear:
        _sum_unselected(routed, work, group, s, t.q)
    if fit is not None:
        fit.fit(t.q, work.query_sums, group, order=s.order_of_sums(t.q.shape[3]))
    _loop(t, s, work, routed, group, scale_log2)


def _routing(t, s):
    samples = {"balance": s.qk == "int8", "channels": s.pv == "int8"}
    if s.routing:
        dtype = _sums_dtype(t.q) if s.linear else None
        return _route(
            t.q, t.k, t.v, t.proj_q, t.proj_k, t.selected, dtype, s.query_block, s.diagonal, s.forced, **samples
        )
    if s.linear or s.qk != "16bit":
        found = pools(t.k, t.q, t.v, **samples)
        return Routing(t.unselected, *_smoothed(found, t.k, t.q.dtype), found)
    return Routing()


def _sum_unselected(routed, work, group, s, q):
    """H_i and Z_i of a group of heads."""
    if not s.low_sums:
        config = configs.product_config(capability(q.device), q.element_size())
        masked_sum(routed.unselected, work.sums, work.query_sums, group, config)
        return
    if s.hopper:
        from .kernels.hopper_masked_sum import hopper_masked_sum

        weighted_mask(routed.unselected, work, group)
        hopper_masked_sum(work, group)
        return
    in_gluon = gluon_is_known() and not interpreting()
    int8_weighted_mask(routed.unselected, work, group, register_order=in_gluon)
    if in_gluon:
        from .kernels.mma_masked_sum import mma_masked_sum

        mma_masked_sum(work, routed.v_channel, group)
    else:
        int8_masked_sum(work, routed.v_channel, group, configs.INT8_PRODUCT)


def _loop(t, s, work, routed, group, scale_log2):
    """The sparse loop of a group of heads, and its linear branch."""
    kind = "none" if not s.linear else "estimated" if t.block_ratio is None else "learned"
    options = {"query_block": s.query_block, "ratio_kind": kind, "scale_log2": scale_log2}
    tensors, selection = (t.q, t.k, t.v, t.out, work, routed.balance), (t.selected, t.block_ratio, t.row_ratio, group)
    if s.hopper:
        from .kernels.hopper_loop import hopper_sparse_attention

        hopper_sparse_attention(*tensors, *selection, qk=s.qk, **options)
        return
    card, element_size = capability(t.q.device), t.q.element_size()
    if s.linear and not (s.pv == "int8" and takes_linear_branch(t.q)):
        config = configs.linear_config(card, element_size)
        linear_attention(
            t.q, work, t.out, t.block_ratio, t.row_ratio, group,
            query_block=s.query_block, ordered=s.pv == "int8", config=config,
        )  # fmt: skip
    config = configs.loop_config(card, s.qk, s.pv, t.q.shape[3], element_size, s.query_block)
    if s.pv == "int8":
        int8_sparse_attention(t.q, t.k.shape[2], t.out, work, routed.pools, *selection, config=config, **options)
        return
    sparse_attention(*tensors, t.selected, t.row_ratio, group, qk=s.qk, pv=s.pv, config=config, **options)
