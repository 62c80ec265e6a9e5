"""A mixing ratio per head, fitted on a few query rows that are computed exactly, in plain torch.

See kernels/fitted_ratio.py, which does the same in Triton, and reference.fitted_ratio, which both are checked against.
"""

import torch

from .router import K_BLOCK, compute_dtype


def row_branches(q, k, v, selected, scale):
    """Both branches of some query rows of one head, exactly.

    Args:
        q: (R, D); k, v: (M, D). selected: bool (R, M), the keys that each row's query block selected.
        scale: softmax scale.

    Returns:
        (dense, o_sparse, o_linear) of (R, D), and the selected mass (R,). o_linear is NaN where no key is left to it.
    """
    p = (q @ k.T * scale).softmax(dim=-1)
    own = p * selected
    mass = own.sum(dim=-1)
    phi_k = (k - k.mean(dim=0)).softmax(dim=-1)
    weights = (q.softmax(dim=-1) @ phi_k.T) * ~selected
    return p @ v, own @ v / mass[:, None], weights @ v / weights.sum(dim=-1, keepdim=True), mass


def fit(branches):
    """The ratio, in [0, 1], that brings the mix of these branches closest to dense attention: see row_branches().

    Rows with NaN or infinity are ignored. Where both branches agree, any ratio is right, and the rows' mean selected mass is
    returned, or 0 where no row is finite.
    """
    dense, o_sparse, o_linear, mass = branches
    to_sparse = o_sparse - o_linear
    cross, square = ((dense - o_linear) * to_sparse).sum(dim=-1), to_sparse.square().sum(dim=-1)
    sound = cross.isfinite() & square.isfinite()
    cross, square = torch.where(sound, cross, 0.0).sum(), torch.where(sound, square, 0.0).sum()
    mean_mass = mass.nan_to_num(0.0).sum() / mass.isfinite().sum().clamp_min(1)
    found = torch.where(square > 0, cross / square, mean_mass)
    return found.clamp(0, 1)


def selected_keys(key_blocks, rows, keys, query_block):
    """bool (R, M): the keys that the query blocks of ``rows`` selected; key_blocks (T_m, n) of one head."""
    columns = torch.arange(keys, device=key_blocks.device) // K_BLOCK
    return (key_blocks[rows // query_block][:, :, None] == columns).any(dim=1)


@torch.no_grad()
def fit_ratio(q, k, v, key_blocks, rows, fitted, dense, scale, query_block):
    """Ratio per video and head (B, H), float32 (float64 for float64 inputs), given the selection; fills dense (B, H, R, D).

    q: (B, H, N, D); k, v: (B, H, M, D). rows: integers (R,), query rows; the first ``fitted`` of them decide the ratio.
    """
    rows, compute = rows.long(), compute_dtype(q)
    ratio = torch.empty(q.shape[:2], dtype=compute, device=q.device)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            head = (q[b, h, rows].to(compute), k[b, h].to(compute), v[b, h].to(compute))
            branches = row_branches(*head, selected_keys(key_blocks[b, h], rows, k.shape[2], query_block), scale)
            dense[b, h] = branches[0]
            ratio[b, h] = fit([part[:fitted] for part in branches])
    return ratio
