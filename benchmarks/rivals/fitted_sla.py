"""SLA version 1 (arXiv 2509.24006, as its released code computes it): O = O_s + proj_l(O_l), for comparison.

O_s: softmax attention over the key blocks of the heuristic router. O_l: linear attention over ALL keys, phi = softmax over
features, of the unsmoothed keys. proj_l: one Linear(D, D) per layer, shared by the heads, zero when untrained.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sla2_kernels import sla2_attention

# of the mean diagonal; the last leaves proj_l next to zero, SLA v1's own start
RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1e6)


def sparse_branch(q, k, v, sparsity, proj_q=None, proj_k=None, precision="16bit", **options):
    """O_s of (B, N, H, D) tensors: softmax attention over the selected key blocks alone. options: of sla2_attention."""
    options |= {"precision": precision, "layout": "BNHD", "linear_branch": False}
    return sla2_attention(q, k, v, proj_q, proj_k, sparsity=sparsity, **options)


def linear_branch(q, k, v):
    """O_l of (B, N, H, D) tensors over all keys, float32."""
    phi_q, phi_k = q.float().softmax(dim=-1), k.float().softmax(dim=-1)
    sums = torch.einsum("bnhd,bnhe->bhde", phi_k, v.float())
    norm = torch.einsum("bnhd,bhd->bnh", phi_q, phi_k.sum(dim=1))
    return torch.einsum("bnhd,bhde->bnhe", phi_q, sums) / norm[..., None]


@dataclass(frozen=True)
class Projection:
    """proj_l of one layer: weight (D, D), bias (D,), applied as x @ W^T + b."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, x):
        return F.linear(x, self.weight, self.bias)


def identity_projection(head_dim, device):
    return Projection(torch.eye(head_dim, device=device), torch.zeros(head_dim, device=device))


def attention(q, k, v, sparsity, projection):
    """SLA v1's output, (B, N, H, D) in q's dtype."""
    return (sparse_branch(q, k, v, sparsity).float() + projection(linear_branch(q, k, v))).to(q.dtype)


@torch.no_grad()
def fit_projection(captures, sparsity):
    """The proj_l that comes closest to dense attention on captures of one layer: ridge regression, in closed form.

    O_l hardly differs between rows, so an unregularised fit may be far off on other calls. The ridge is the one with which
    each capture is predicted best from the others; one capture alone takes the smallest.
    """
    parts = [_normal_equations(capture, sparsity) for capture in captures]
    gram, moment = (sum(part[i] for part in parts) for i in range(2))
    ridge = RIDGES[0]
    if len(parts) > 1:
        ridge = min(RIDGES, key=lambda r: sum(_error(_solve(gram - g, moment - m, r), g, m) for g, m in parts))
    solution = _solve(gram, moment, ridge).float()
    return Projection(solution[:-1].T.contiguous(), solution[-1])


def _normal_equations(capture, sparsity):
    """gram (D + 1, D + 1) and moment (D + 1, D), float64, of O_l with a column of ones against what O_s lacks."""
    q, k, v = (x.transpose(1, 2) for x in (capture.q, capture.k, capture.v))
    dense = F.scaled_dot_product_attention(capture.q, capture.k, capture.v).transpose(1, 2)
    wanted = (dense.double() - sparse_branch(q, k, v, sparsity).double()).flatten(0, 2)
    features = F.pad(linear_branch(q, k, v).double().flatten(0, 2), (0, 1), value=1.0)
    return features.T @ features, features.T @ wanted


def _solve(gram, moment, ridge):
    eye = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + ridge * gram.diagonal().mean() * eye, moment)


def _error(solution, gram, moment):
    """Squared error of a solution on one capture, less what does not depend on the solution."""
    return float((solution * (gram @ solution)).sum() - 2 * (solution * moment).sum())
