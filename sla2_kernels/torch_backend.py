"""The forward pass in plain torch, head by head and a few query blocks at a time: for devices without Triton.

No tensor grows with N x M: one chunk of query blocks holds its gathered keys and its scores, within CHUNK_BYTES.
It is differentiable (each chunk is recomputed in the backward pass) and emulates the low-bit formats.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from . import quantization as quant
from .router import K_BLOCK, Q_BLOCK, block_count

CHUNK_BYTES = 256 * 2**20


def _blocks(x, block):
    """(N, D) -> (T, block, D), the ragged last block filled up with zeros."""
    count = block_count(x.shape[0], block)
    return F.pad(x, (0, 0, 0, count * block - x.shape[0])).unflatten(0, (count, block))


def _quantize(q_blocks, k_blocks, v_blocks, precision):
    block = (-2, -1)
    if precision == "int8":
        return (
            quant.fake_int8(q_blocks, block),
            quant.fake_int8(k_blocks, block),
            quant.fake_fp8_exponent(v_blocks, block),
        )
    if precision == "fp8":
        return (
            quant.fake_fp8(q_blocks, block),
            quant.fake_fp8(k_blocks, block),
            quant.fake_fp8_exponent(v_blocks, block),
        )
    return q_blocks, k_blocks, v_blocks


def _linear_sums(k_blocks, v_blocks, live):
    """Per key block h_j = phi(K_j)^T V_j beside z_j = column sums of phi(K_j): (T_n, D, D + 1)."""
    phi_k = k_blocks.softmax(dim=-1) * live[..., None]
    values_and_one = torch.cat([v_blocks, torch.ones_like(v_blocks[..., :1])], dim=-1)
    return phi_k.transpose(1, 2) @ values_and_one


def _estimated_ratio(q, k_means, log_live, unselected, scale, selected_log_mass):
    """m_s / (m_s + m_u): m_s from the log-sum-exp, m_u from one mean key per unselected block (facts: estimated alpha)."""
    logits = q @ k_means.T * scale + log_live
    unselected_log_mass = logits.masked_fill(~unselected[:, None, :], -torch.inf).logsumexp(dim=-1)
    return torch.sigmoid(selected_log_mass - unselected_log_mass)


def _attend_chunk(q, q_low, k_low, v_low, sums, k_means, live, selected, ratio, scale, low_bit):
    """One chunk of C query blocks of one head: q (C, 128, D), selected (C, n) -> out (C, 128, D), ratio (C, 128)."""
    chunk, count = selected.shape
    keys = k_low[selected].flatten(1, 2)
    values = v_low[selected].flatten(1, 2)
    dead = ~live[selected].flatten(1, 2)

    logits = (q_low @ keys.transpose(1, 2) * scale).masked_fill(dead[:, None, :], -torch.inf)
    row_max = logits.detach().amax(dim=-1, keepdim=True)
    p = torch.exp(logits - row_max)
    row_sum = p.sum(dim=-1, keepdim=True)
    o_sparse = (quant.fake_fp8_probabilities(p) if low_bit else p) @ values / row_sum
    if count == k_low.shape[0]:
        return o_sparse, torch.ones_like(row_sum[..., 0])

    unselected = torch.ones(chunk, k_low.shape[0], dtype=torch.bool, device=q.device).scatter(1, selected, False)
    h_and_z = (unselected.to(q.dtype) @ sums.flatten(1)).unflatten(1, sums.shape[1:])
    numerator_and_norm = q.softmax(dim=-1) @ h_and_z
    o_linear = numerator_and_norm[..., :-1] / numerator_and_norm[..., -1:]

    if ratio is None:
        with torch.no_grad():
            log_live = live.sum(dim=1).to(q.dtype).log()
            selected_log_mass = (row_max + row_sum.log())[..., 0]
            row_ratio = _estimated_ratio(q, k_means, log_live, unselected, scale, selected_log_mass)
    else:
        row_ratio = ratio[:, None].expand(-1, Q_BLOCK)
    return row_ratio[..., None] * o_sparse + (1 - row_ratio[..., None]) * o_linear, row_ratio


def _chunk_size(count, head_dim, element_bytes):
    per_query_block = element_bytes * (Q_BLOCK * count * K_BLOCK * 3 + 2 * count * K_BLOCK * head_dim + head_dim**2)
    return max(1, CHUNK_BYTES // per_query_block)


def _attend_head(q, k, v, selected, ratio, scale, precision):
    """One head: q (N, D), k and v (M, D), selected (T_m, n), ratio (T_m,) or None -> out (N, D), ratio (N,)."""
    k = k - k.mean(dim=0, keepdim=True)
    q_blocks, k_blocks, v_blocks = _blocks(q, Q_BLOCK), _blocks(k, K_BLOCK), _blocks(v, K_BLOCK)
    live = _blocks(torch.ones_like(k[:, :1]), K_BLOCK)[..., 0].bool()
    k_means = k_blocks.sum(dim=1) / live.sum(dim=1, keepdim=True)
    sums = _linear_sums(k_blocks, v_blocks, live) if selected.shape[1] < k_blocks.shape[0] else None
    q_low, k_low, v_low = _quantize(q_blocks, k_blocks, v_blocks, precision)

    outputs, ratios = [], []
    step = _chunk_size(selected.shape[1], q.shape[1], q.element_size())
    for start in range(0, q_blocks.shape[0], step):
        rows = slice(start, start + step)
        chunk_ratio = None if ratio is None else ratio[rows]
        arguments = (q_blocks[rows], q_low[rows], k_low, v_low, sums, k_means, live, selected[rows], chunk_ratio)
        if torch.is_grad_enabled():
            out, row_ratio = checkpoint(_attend_chunk, *arguments, scale, precision != "16bit", use_reentrant=False)
        else:
            out, row_ratio = _attend_chunk(*arguments, scale, precision != "16bit")
        outputs.append(out.flatten(0, 1))
        ratios.append(row_ratio.flatten())
    return torch.cat(outputs)[: q.shape[0]], torch.cat(ratios)[: q.shape[0]]


def attention(q, k, v, key_blocks, ratios, *, scale, precision):
    """SLA2 over BHND views, given the selection.

    Args:
        q: (B, H, N, D); k, v: (B, H, M, D), any stride, one dtype.
        key_blocks: (B, H, T_m, n) selected key blocks. ratios: (H, T_m) or None to estimate them.
        scale: softmax scale. precision: "16bit", "int8" or "fp8".

    Returns:
        out (B, H, N, D) in q's dtype and the ratio per query row (B, H, N), float32 (float64 for float64 inputs).
    """
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    outputs, row_ratios = [], []
    with torch.autocast(q.device.type, enabled=False):
        for b in range(q.shape[0]):
            for h in range(q.shape[1]):
                head = (q[b, h].to(compute), k[b, h].to(compute), v[b, h].to(compute))
                ratio = None if ratios is None else ratios[h].to(compute)
                out, row_ratio = _attend_head(*head, key_blocks[b, h].long(), ratio, scale, precision)
                outputs.append(out.to(q.dtype))
                row_ratios.append(row_ratio)
    return torch.stack(outputs).unflatten(0, q.shape[:2]), torch.stack(row_ratios).unflatten(0, q.shape[:2])
