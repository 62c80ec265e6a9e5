"""SLA version 1 (arXiv 2509.24006, as its released code computes it): O = O_s + proj_l(O_l), for comparison.

O_s: softmax attention over the key blocks of the heuristic router. O_l: linear attention over ALL keys, phi = softmax over
features, of the unsmoothed keys. proj_l: one Linear(D, D) per layer, shared by the heads, zero when untrained.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sla2_kernels import sla2_attention

RIDGE = 1e-6  # of the mean diagonal: keeps the normal equations solvable where features are collinear


def sparse_branch(q, k, v, sparsity, proj_q=None, proj_k=None):
    """O_s of (B, N, H, D) tensors: softmax attention over the selected key blocks alone."""
    ones = torch.ones(q.shape[2], device=q.device)
    return sla2_attention(
        q, k, v, proj_q, proj_k, ones, sparsity=sparsity, precision="16bit", layout="BNHD"
    )  # fmt: skip


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
    """The proj_l that comes closest to dense attention on some captures of one layer: least squares, in closed form.

    No training can give SLA v1 a lower error on these captures with the model's own weights frozen.
    """
    gram = moment = 0.0
    for capture in captures:
        q, k, v = (x.transpose(1, 2) for x in (capture.q, capture.k, capture.v))
        dense = F.scaled_dot_product_attention(capture.q, capture.k, capture.v).transpose(1, 2)
        wanted = (dense.double() - sparse_branch(q, k, v, sparsity).double()).flatten(0, 2)
        features = F.pad(linear_branch(q, k, v).double().flatten(0, 2), (0, 1), value=1.0)
        gram, moment = gram + features.T @ features, moment + features.T @ wanted
    eye = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    solution = torch.linalg.solve(gram + RIDGE * gram.diagonal().mean() * eye, moment).float()
    return Projection(solution[:-1].T.contiguous(), solution[-1])
