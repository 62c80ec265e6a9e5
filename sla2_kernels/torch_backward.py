"""Gradients of the torch backend, written out: chunk by chunk, each recomputed from the inputs, nothing kept between them.

The rounding of the low-bit formats counts as the identity (straight-through), an estimated ratio as a constant.
"""

import torch

from . import quantization as quant
from . import torch_backend
from .router import K_BLOCK, Q_BLOCK, compute_dtype


def _softmax_gradient(grad, softmax):
    return softmax * (grad - (grad * softmax).sum(dim=-1, keepdim=True))


def _sparse_gradient(chunk, selected, operands, scale, totals, low_bit):
    """Adds the softmax branch's gradients into ``totals``; the gradient of the chunk's queries. chunk: (o_s, p, row_sum, grad)."""
    output, p, row_sum, grad = chunk
    queries, keys, values = operands
    weights = (quant.fake_fp8_probabilities(p) if low_bit else p) / row_sum
    grad_logits = p / row_sum * (grad @ values.transpose(1, 2) - (grad * output).sum(dim=-1, keepdim=True)) * scale
    blocks = selected.flatten()
    for total, product in (
        (totals["k"], grad_logits.transpose(1, 2) @ queries),
        (totals["v"], weights.transpose(1, 2) @ grad),
    ):
        total.index_add_(0, blocks, product.unflatten(1, (-1, K_BLOCK)).flatten(0, 1))
    return grad_logits @ keys


def _linear_gradient(queries, unselected, sums, o_linear, norm, grad, totals):
    """Adds the linear branch's gradient of the block sums into ``totals``; the gradient of the chunk's queries."""
    phi_q = queries.softmax(dim=-1)
    grad_sums = torch.cat([grad, -(grad * o_linear).sum(dim=-1, keepdim=True)], dim=-1) / norm
    totals["sums"] += (unselected.T @ (phi_q.transpose(1, 2) @ grad_sums).flatten(1)).unflatten(1, sums.shape[1:])
    mixed = (unselected @ sums.flatten(1)).unflatten(1, sums.shape[1:])
    return _softmax_gradient(grad_sums @ mixed.transpose(1, 2), phi_q)


def _chunk_gradient(head, rows, ratio, grad, scale, totals, low_bit):
    """(gradient of the chunk's queries (C, R, D), d loss / d ratio (C,)); gradients of K, V and the sums go into ``totals``."""
    selected, queries, low = head.selected[rows], head.q_blocks[rows], head.q_low[rows]
    keys, values = head.k_low[selected].flatten(1, 2), head.v_low[selected].flatten(1, 2)
    p, row_max, row_sum = torch_backend.softmax_numerators(low, keys, head.valid[selected].flatten(1, 2), scale)
    sparse = (quant.fake_fp8_probabilities(p) if low_bit else p) @ values / row_sum
    if head.sums is None:
        grad_q = _sparse_gradient((sparse, p, row_sum, grad), selected, (low, keys, values), scale, totals, low_bit)
        return grad_q, grad.new_zeros(len(selected))
    unselected = torch_backend.unselected_blocks(selected, len(head.k_low))
    o_linear, norm, has_weight = torch_backend.linear_parts(queries, unselected, head.sums)
    if ratio is None:
        log_mass = (row_max + row_sum.log())[..., 0]
        share = torch_backend.estimated_ratio(queries, head.k_means, head.valid, unselected, scale, log_mass)[..., None]
    else:
        share = ratio[:, None, None]
    share = share.where(has_weight, 1.0)
    grad_ratio = (grad * (sparse - o_linear)).where(has_weight, 0.0).sum(dim=(1, 2))
    grad_q = _sparse_gradient((sparse, p, row_sum, grad * share), selected, (low, keys, values), scale, totals, low_bit)
    linear = (unselected.to(queries.dtype), head.sums, o_linear, norm, grad * (1 - share), totals)
    return grad_q + _linear_gradient(queries, *linear), grad_ratio


def _head_gradient(q, k, v, selected, ratio, grad, scale, precision, linear_branch, query_block):
    """One head: gradients of q (N, D), k and v (M, D) and of the ratio (T_m,)."""
    head = torch_backend.prepare_head(q, k, v, selected, precision, linear_branch, query_block)
    totals = {"k": torch.zeros_like(head.k_low), "v": torch.zeros_like(head.v_low)}
    if head.sums is not None:
        totals["sums"] = torch.zeros_like(head.sums)
    grad_blocks, grads_q, grad_ratios = torch_backend.blocks_of(grad, query_block), [], []
    for rows in torch_backend.chunks(head):
        grad_q, grad_ratio = _chunk_gradient(
            head, rows, None if ratio is None else ratio[rows], grad_blocks[rows], scale, totals, precision != "16bit"
        )
        grads_q.append(grad_q.flatten(0, 1))
        grad_ratios.append(grad_ratio)
    if head.sums is not None:
        phi_k = head.k_blocks.softmax(dim=-1)
        values_and_one = torch.cat([head.v_blocks, torch.ones_like(head.v_blocks[..., :1])], dim=-1)
        grad_phi = values_and_one @ totals["sums"].transpose(1, 2)
        totals["k"] += _softmax_gradient(grad_phi, phi_k) * head.valid[..., None]
        totals["v"] += phi_k @ totals["sums"][..., :-1]
    grad_k, grad_v = (totals[name].flatten(0, 1)[: k.shape[0]] for name in ("k", "v"))
    # K is smoothed: its mean is taken off
    grad_k = grad_k - grad_k.mean(dim=0, keepdim=True)
    return torch.cat(grads_q)[: q.shape[0]], grad_k, grad_v, torch.cat(grad_ratios)


@torch.no_grad()
def attention_backward(
    q, k, v, grad_out, key_blocks, ratio, grad_q, grad_k, grad_v, *, scale, precision, linear_branch=True,
    query_block=Q_BLOCK,
):  # fmt: skip
    """Fills grad_q (B, H, N, D), grad_k and grad_v (B, H, M, D), any stride; returns d loss / d ratio, (B, H, T_m).

    ratio: (H, T_m), or None where it was estimated or there is no linear branch. The rest as in torch_backend.attention.
    """
    compute = compute_dtype(q)
    grad_ratio = torch.zeros(key_blocks.shape[:3], dtype=compute, device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        for b in range(q.shape[0]):
            for h in range(q.shape[1]):
                tensors = [t[b, h].to(compute) for t in (q, k, v)]
                own = None if ratio is None else ratio[h].to(compute)
                selected, grad = key_blocks[b, h].long(), grad_out[b, h].to(compute)
                found = _head_gradient(*tensors, selected, own, grad, scale, precision, linear_branch, query_block)
                for target, gradient in zip((grad_q[b, h], grad_k[b, h], grad_v[b, h]), found[:3], strict=True):
                    target.copy_(gradient)
                grad_ratio[b, h] = found[3]
    return grad_ratio
