"""SLA2's forward pass, equation by equation, in float64: the definition that every other implementation is checked against.

Source: "SLA2: Sparse-Linear Attention with Learnable Routing and QAT", arXiv 2602.12675, Eq. 13-16. There is no
quantisation here: low-bit kernels approximate this. It goes through the query blocks one by one, so its memory grows with
query_block x M instead of N x M, and a few query blocks of a full-size model can be checked too.
"""

import torch

from .router import K_BLOCK, MIN_LINEAR_WEIGHT, Q_BLOCK, block_count, resample_ratio, selected_block_count


def phi(x):
    """The feature map of the linear branch: softmax over the feature dimension."""
    return x.softmax(dim=-1)


def pool(x, block):
    """Means over blocks of ``block`` tokens, (B, H, N, D) -> (B, H, T, D); a ragged last block averages its valid tokens."""
    return torch.stack([part.mean(dim=2) for part in x.split(block, dim=2)], dim=2)


def router_scores(q, k_smooth, proj_q=None, proj_k=None, scale=1.0, query_block=Q_BLOCK):
    """P_c = proj_q(pool(Q)) proj_k(pool(K))^T * scale (Eq. 13), (B, H, T_m, T_n). proj: (D, D) or (H, D, D), x @ W^T."""
    q_pooled, k_pooled = pool(q, query_block), pool(k_smooth, K_BLOCK)
    if proj_q is not None:
        q_pooled = q_pooled @ proj_q.to(q_pooled).transpose(-1, -2)
    if proj_k is not None:
        k_pooled = k_pooled @ proj_k.to(k_pooled).transpose(-1, -2)
    return q_pooled @ k_pooled.transpose(-1, -2) * scale


def top_k_mask(scores, count):
    """M_c in {0, 1}: the ``count`` largest scores of each row; of equal scores the lowest index wins."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order[..., :count], True)


def with_diagonal(scores, query_block=Q_BLOCK):
    """P_c with the blocks that hold a query block's own tokens above all others; queries and keys are the same tokens."""
    scores = scores.clone()
    per_query_block = query_block // K_BLOCK
    for i in range(scores.shape[-2]):
        scores[..., i, i * per_query_block : (i + 1) * per_query_block] = torch.inf
    return scores


def sla2_reference(
    q, k, v, proj_q=None, proj_k=None, alpha=None, *,
    sparsity=0.97, scale=None, key_blocks=None, query_blocks=None, keep_diagonal=False, linear_branch=True,
    query_block=Q_BLOCK,
):  # fmt: skip
    """SLA2 attention in float64 (arXiv 2602.12675, Eq. 13-16).

    Args:
        q: (B, H, N, D); k, v: (B, H, M, D); any floating dtype.
        proj_q, proj_k: (D, D) or (H, D, D) router projections; None is the identity.
        alpha: ratios in (0, 1), (H,) or (H, A) knots along the query axis; None estimates the selected mass per row.
        sparsity: share of key blocks that the softmax branch skips, 0 to below 1.
        scale: softmax scale; None is D ** -0.5.
        key_blocks: int (B, H, T_m, n), a selection to use instead of routing.
        keep_diagonal: each query block always takes the key blocks of its own tokens, within its count.
        query_blocks: indices of the query blocks to compute; None computes all of them.
        linear_branch: False leaves the softmax branch alone: O = O_s, with a ratio of 1.
        query_block: tokens of a query block, 128 or 64.

    Returns:
        (out, ratio): float64 (B, H, rows, D) and the ratio used per row, (B, H, rows); rows are all N queries, or those
        of ``query_blocks`` one after the other.
    """
    q, k, v = q.double(), k.double(), v.double()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tokens = k.shape[2]
    query_block_count, key_block_count = block_count(q.shape[2], query_block), block_count(tokens, K_BLOCK)

    k = k - k.mean(dim=2, keepdim=True)
    if key_blocks is None:
        scores = router_scores(q, k, proj_q, proj_k, scale, query_block)
        scores = with_diagonal(scores, query_block) if keep_diagonal else scores
        mask = top_k_mask(scores, selected_block_count(sparsity, key_block_count))
    else:
        shape = (*q.shape[:2], query_block_count, key_block_count)
        mask = torch.zeros(shape, dtype=torch.bool, device=q.device).scatter(-1, key_blocks.long(), True)
    block_ratio = None if alpha is None else resample_ratio(alpha.double(), query_block_count)

    phi_k = phi(k)
    k_means = pool(k, K_BLOCK)
    block_tokens = torch.full((key_block_count,), K_BLOCK, dtype=q.dtype, device=q.device)
    block_tokens[-1] = tokens - (key_block_count - 1) * K_BLOCK

    outputs, row_ratios = [], []
    for i in range(query_block_count) if query_blocks is None else query_blocks:
        q_i = q[:, :, i * query_block : (i + 1) * query_block]
        selected = mask[:, :, i].repeat_interleave(K_BLOCK, dim=-1)[..., None, :tokens]
        unselected_blocks = ~mask[:, :, i]

        logits = (q_i @ k.transpose(-1, -2) * scale).masked_fill(~selected, -torch.inf)
        o_sparse = logits.softmax(dim=-1) @ v
        if not linear_branch:
            outputs.append(o_sparse)
            row_ratios.append(torch.ones_like(o_sparse[..., 0]))
            continue

        phi_k_unselected = phi_k * ~selected.transpose(-1, -2)
        h = phi_k_unselected.transpose(-1, -2) @ v
        z = phi_k_unselected.sum(dim=2)[..., None]
        phi_q = phi(q_i)
        similarity = phi_q @ z / phi_q.amax(dim=-1, keepdim=True) / (key_block_count * K_BLOCK)
        has_linear = similarity >= MIN_LINEAR_WEIGHT
        o_linear = torch.where(has_linear, phi_q @ h, 0.0) / torch.where(has_linear, phi_q @ z, 1.0)

        if block_ratio is None:
            selected_mass = logits.logsumexp(dim=-1)
            block_logits = q_i @ k_means.transpose(-1, -2) * scale + block_tokens.log()
            unselected_mass = block_logits.masked_fill(~unselected_blocks[..., None, :], -torch.inf).logsumexp(dim=-1)
            ratio = torch.sigmoid(selected_mass - unselected_mass).detach()
        else:
            ratio = block_ratio[None, :, i, None].expand(q_i.shape[:3])
        ratio = torch.where(has_linear[..., 0], ratio, 1.0)

        outputs.append(ratio[..., None] * o_sparse + (1 - ratio[..., None]) * o_linear)
        row_ratios.append(ratio)
    return torch.cat(outputs, dim=2), torch.cat(row_ratios, dim=2)


def fitted_ratio(q, k, v, key_blocks, rows, scale=None, query_block=Q_BLOCK):
    """The ratio of each head that brings the mix closest to dense attention on some query rows, in float64.

    Least squares over the rows: a = sum <O - O_l, O_s - O_l> / sum |O_s - O_l|^2.

    Args:
        q: (B, H, N, D); k, v: (B, H, M, D). key_blocks: int (B, H, T_m, n), the selection, with a block left out of every
            row. rows: int (R,), the query rows. scale: softmax scale; None is D ** -0.5.
        query_block: as above.

    Returns:
        (ratio, dense): float64 (B, H), in [0, 1], and the rows' dense attention, (B, H, R, D).
    """
    q, k, v, rows = q.double(), k.double(), v.double(), rows.long()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tokens, blocks = k.shape[2], block_count(k.shape[2], K_BLOCK)
    k = k - k.mean(dim=2, keepdim=True)
    rows_blocks = key_blocks[:, :, rows // query_block].long()
    mask = torch.zeros(*rows_blocks.shape[:3], blocks, dtype=torch.bool, device=q.device).scatter(-1, rows_blocks, True)
    selected = mask.repeat_interleave(K_BLOCK, dim=-1)[..., :tokens]

    logits = q[:, :, rows] @ k.transpose(-1, -2) * scale
    dense = logits.softmax(dim=-1) @ v
    o_sparse = logits.masked_fill(~selected, -torch.inf).softmax(dim=-1) @ v
    weights = (phi(q[:, :, rows]) @ phi(k).transpose(-1, -2)).masked_fill(selected, 0.0)
    o_linear = weights @ v / weights.sum(dim=-1, keepdim=True)
    cross = ((dense - o_linear) * (o_sparse - o_linear)).sum(dim=(2, 3))
    square = (o_sparse - o_linear).square().sum(dim=(2, 3))
    return (cross / square).clamp(0, 1), dense
