"""The forward pass in plain torch, head by head and a few query blocks at a time: for devices without Triton.

No tensor grows with N x M: one chunk of query blocks holds its gathered keys and its scores, within CHUNK_BYTES.
It emulates the low-bit formats; torch_backward.py has its gradients.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from . import quantization as quant
from .router import K_BLOCK, MIN_LINEAR_WEIGHT, Q_BLOCK, block_count, compute_dtype

CHUNK_BYTES = 256 * 2**20


@dataclass
class Head:
    """One head in blocks, those of q of R rows: q (T_m, R, D), k, smoothed, and v (T_n, 64, D), each also as the low-bit formats see it.

    valid (T_n, 64): False on the padding of the last block. selected: (T_m, n). sums: (T_n, D, D + 1), None where there is
    no linear branch: it was not asked for, or every block is selected.
    """

    q_blocks: torch.Tensor
    k_blocks: torch.Tensor
    v_blocks: torch.Tensor
    q_low: torch.Tensor
    k_low: torch.Tensor
    v_low: torch.Tensor
    valid: torch.Tensor
    k_means: torch.Tensor
    sums: torch.Tensor | None
    selected: torch.Tensor


def blocks_of(x, block):
    """(N, D) -> (T, block, D), the ragged last block filled up with zeros."""
    count = block_count(x.shape[0], block)
    return F.pad(x, (0, 0, 0, count * block - x.shape[0])).unflatten(0, (count, block))


def _quantize(q_blocks, k_blocks, v_blocks, precision, factor):
    """factor: (D,), what K's channels are multiplied with, and Q's divided by, while INT8 rounds them."""
    block = (-2, -1)
    if precision == "int8":
        return (
            quant.fake_int8(q_blocks / factor, block) * factor,
            quant.fake_int8(k_blocks * factor, block) / factor,
            quant.fake_fp8_exponent(v_blocks, block),
        )
    if precision == "fp8":
        return (
            quant.fake_fp8(q_blocks, block),
            quant.fake_fp8(k_blocks, block),
            quant.fake_fp8_exponent(v_blocks, block),
        )
    return q_blocks, k_blocks, v_blocks


def _linear_sums(k_blocks, v_blocks, valid):
    """Per key block h_j = phi(K_j)^T V_j beside z_j = column sums of phi(K_j): (T_n, D, D + 1)."""
    phi_k = k_blocks.softmax(dim=-1) * valid[..., None]
    values_and_one = torch.cat([v_blocks, torch.ones_like(v_blocks[..., :1])], dim=-1)
    return phi_k.transpose(1, 2) @ values_and_one


def prepare_head(q, k, v, selected, precision, linear_branch=True, query_block=Q_BLOCK):
    """Head of q (N, D), k and v (M, D); its query blocks have ``query_block`` rows."""
    k = k - k.mean(dim=0, keepdim=True)
    q_blocks, k_blocks, v_blocks = blocks_of(q, query_block), blocks_of(k, K_BLOCK), blocks_of(v, K_BLOCK)
    valid = blocks_of(torch.ones_like(k[:, :1]), K_BLOCK)[..., 0].bool()
    k_means = k_blocks.sum(dim=1) / valid.sum(dim=1, keepdim=True)
    linear = linear_branch and selected.shape[1] < k_blocks.shape[0]
    sums = _linear_sums(k_blocks, v_blocks, valid) if linear else None
    low = _quantize(q_blocks, k_blocks, v_blocks, precision, quant.balance(q, k) if precision == "int8" else None)
    return Head(q_blocks, k_blocks, v_blocks, *low, valid, k_means, sums, selected)


def chunks(head):
    """Slices of query blocks that fit CHUNK_BYTES each: fixed by shapes, never by free memory."""
    count, (query_block, head_dim) = head.selected.shape[1], head.q_blocks.shape[1:]
    per_query_block = head.q_blocks.element_size() * (
        query_block * count * K_BLOCK * 3 + 2 * count * K_BLOCK * head_dim + head_dim**2
    )
    step = max(1, CHUNK_BYTES // per_query_block)
    return [slice(start, start + step) for start in range(0, len(head.q_blocks), step)]


def softmax_numerators(q, keys, valid, scale):
    """(exp(S - row maximum) (C, R, n * 64), row maximum, row sum) of q (C, R, D) over gathered keys (C, n * 64, D)."""
    logits = (q @ keys.transpose(1, 2) * scale).masked_fill(~valid[:, None, :], -torch.inf)
    row_max = logits.amax(dim=-1, keepdim=True)
    p = torch.exp(logits - row_max)
    return p, row_max, p.sum(dim=-1, keepdim=True)


def unselected_blocks(selected, blocks):
    """(C, n) -> (C, T_n) bool."""
    return torch.ones(len(selected), blocks, dtype=torch.bool, device=selected.device).scatter(1, selected, False)


def linear_parts(q, unselected, sums):
    """O_l (C, R, D), its denominator (C, R, 1), and where it has weight (C, R, 1); elsewhere the denominator is 1."""
    h_and_z = (unselected.to(q.dtype) @ sums.flatten(1)).unflatten(1, sums.shape[1:])
    phi_q = q.softmax(dim=-1)
    found = phi_q @ h_and_z
    norm = found[..., -1:]
    least = MIN_LINEAR_WEIGHT * len(sums) * K_BLOCK
    # not "norm >= least", which would take a NaN for no weight
    has_weight = ~(norm < least * phi_q.amax(dim=-1, keepdim=True))
    norm = norm.where(has_weight, 1.0)
    return found[..., :-1] / norm, norm, has_weight


def estimated_ratio(q, k_means, valid, unselected, scale, selected_log_mass):
    """m_s / (m_s + m_u): m_s from the log-sum-exp, m_u from one mean key per unselected block (facts: estimated alpha)."""
    logits = q @ k_means.T * scale + valid.sum(dim=1).to(q.dtype).log()
    unselected_log_mass = logits.masked_fill(~unselected[:, None, :], -torch.inf).logsumexp(dim=-1)
    return torch.sigmoid(selected_log_mass - unselected_log_mass)


def _attend_chunk(head, rows, ratio, scale, low_bit):
    """One chunk of C query blocks of one head: out (C, R, D), ratio (C, R)."""
    selected, q = head.selected[rows], head.q_blocks[rows]
    keys, values = head.k_low[selected].flatten(1, 2), head.v_low[selected].flatten(1, 2)
    p, row_max, row_sum = softmax_numerators(head.q_low[rows], keys, head.valid[selected].flatten(1, 2), scale)
    o_sparse = (quant.fake_fp8_probabilities(p) if low_bit else p) @ values / row_sum
    if head.sums is None:
        return o_sparse, torch.ones_like(row_sum[..., 0])

    unselected = unselected_blocks(selected, len(head.k_low))
    o_linear, _, has_weight = linear_parts(q, unselected, head.sums)
    if ratio is None:
        log_mass = (row_max + row_sum.log())[..., 0]
        row_ratio = estimated_ratio(q, head.k_means, head.valid, unselected, scale, log_mass)
    else:
        row_ratio = ratio[:, None].expand(-1, q.shape[1])
    row_ratio = row_ratio.where(has_weight[..., 0], 1.0)
    return row_ratio[..., None] * o_sparse + (1 - row_ratio[..., None]) * o_linear, row_ratio


def _attend_head(q, k, v, selected, ratio, scale, precision, linear_branch, query_block):
    """One head: q (N, D), k and v (M, D), selected (T_m, n), ratio (T_m,) or None -> out (N, D), ratio (N,)."""
    head = prepare_head(q, k, v, selected, precision, linear_branch, query_block)
    outputs, row_ratios = [], []
    for rows in chunks(head):
        out, row_ratio = _attend_chunk(head, rows, None if ratio is None else ratio[rows], scale, precision != "16bit")
        outputs.append(out.flatten(0, 1))
        row_ratios.append(row_ratio.flatten())
    return torch.cat(outputs)[: q.shape[0]], torch.cat(row_ratios)[: q.shape[0]]


@torch.no_grad()
def attention(q, k, v, key_blocks, ratio, out, *, scale, precision, linear_branch=True, query_block=Q_BLOCK):
    """SLA2 over BHND views, given the selection: fills out, returns the ratio of each query row.

    Args:
        q, out: (B, H, N, D); k, v: (B, H, M, D), any stride, one dtype.
        key_blocks: (B, H, T_m, n) selected key blocks. ratio: (H, T_m) or (B, H, T_m), or None to estimate it per row.
        scale: softmax scale. precision: "16bit", "int8" or "fp8". linear_branch: False leaves it out.
        query_block: query rows that share a selection.

    Returns:
        (B, H, N), float32 (float64 for float64 inputs).
    """
    compute = compute_dtype(q)
    row_ratios = torch.empty(q.shape[:3], dtype=compute, device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        for b in range(q.shape[0]):
            for h in range(q.shape[1]):
                head = (q[b, h].to(compute), k[b, h].to(compute), v[b, h].to(compute))
                own = None if ratio is None else (ratio[h] if ratio.dim() == 2 else ratio[b, h]).to(compute)
                found = _attend_head(*head, key_blocks[b, h].long(), own, scale, precision, linear_branch, query_block)
                out[b, h], row_ratios[b, h] = found
    return row_ratios
