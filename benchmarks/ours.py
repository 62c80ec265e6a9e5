"""SLA2 as the benchmark calls it: the whole operation on the views ComfyUI hands over, and the check before any timing."""

from dataclasses import dataclass

import torch

from sla2_kernels import Q_BLOCK, select_key_blocks, sla2_attention
from sla2_kernels.reference import sla2_reference
from sla2_kernels.router import K_BLOCK, block_count, router_scores, selected_block_count, top_k_blocks

from .rivals.packages import Method

NAME = "sla2"
PRECISIONS = ("16bit", "int8", "fp8")
ALPHAS = ("learned", "estimated")
NO_LINEAR_BRANCH = "none"  # no ratio, since there is nothing to mix: top-k only, and SLA v1's softmax branch
# largest relative output error against float64 that a timed row may have: on Gaussian inputs 8-bit formats have
# 0.013-0.041 (int8) and 0.030-0.053 (fp8)
TOLERANCE = {"16bit": 0.01, "int8": 0.06, "fp8": 0.09}


@dataclass(frozen=True)
class Weights:
    """What a router file would bring for one layer; all None for the untrained mode."""

    proj_q: torch.Tensor | None = None
    proj_k: torch.Tensor | None = None
    alpha: torch.Tensor | None = None

    def heads(self, index):
        return Weights(self.proj_q, self.proj_k, None if self.alpha is None else self.alpha[index])


def weights_for(alpha, heads, head_dim, device):
    """Stand-ins for a trained router ("learned": shared projections near the identity, a ratio per head), or none of it
    ("estimated"), or its projections alone (NO_LINEAR_BRANCH)."""
    if alpha == "estimated":
        return Weights()
    generator = torch.Generator().manual_seed(1)
    proj_q, proj_k = (
        torch.eye(head_dim) + 0.1 * head_dim**-0.5 * torch.randn(head_dim, head_dim, generator=generator)
        for _ in range(2)
    )
    ratio = None if alpha == NO_LINEAR_BRANCH else torch.linspace(0.6, 0.95, heads).to(device)
    return Weights(proj_q.to(device), proj_k.to(device), ratio)


def sla2_method(sparsity, precision, alpha, backend="auto"):
    """The Method that times sla2_attention with these settings."""

    def prepare(q, k, v):
        return _call(q, k, v, sparsity, precision, alpha, backend)

    fields = {"precision": precision, "alpha": alpha, "backend": backend}
    return Method(NAME, prepare, sparsity, fields)


def _call(q, k, v, sparsity, precision, alpha, backend):
    weights = weights_for(alpha, q.shape[2], q.shape[3], q.device)
    options = {"precision": precision, "layout": "BNHD", "backend": backend, "linear_branch": alpha != NO_LINEAR_BRANCH}
    return lambda: sla2_attention(q, k, v, weights.proj_q, weights.proj_k, weights.alpha, sparsity=sparsity, **options)


@dataclass(frozen=True)
class Check:
    """relative_error: against float64 on some heads and query blocks, same selection. selection_error: share of those
    rows' selected blocks that float64 routing would not have taken. repeatable: two runs are bitwise equal."""

    relative_error: float
    selection_error: float
    repeatable: bool
    tolerance: float

    @property
    def passed(self):
        return self.repeatable and self.relative_error <= self.tolerance

    def as_fields(self):
        return {
            "relative_error": self.relative_error,
            "selection_error": self.selection_error,
            "repeatable": self.repeatable,
            "passed": self.passed,
        }


@torch.no_grad()
def check(q, k, v, sparsity, precision, alpha, *, backend="auto", slack=1.0, heads=3, blocks=6, seed=0):
    """Checks one setting on whole inputs against the float64 definition, on random heads and query blocks.

    slack multiplies the tolerance: inputs sharper than Gaussian ones lose more to 8 bit.
    """
    run = _call(q, k, v, sparsity, precision, alpha, backend)
    first = run()
    repeatable = torch.equal(first, run())
    weights = weights_for(alpha, q.shape[2], q.shape[3], q.device)
    selected = select_key_blocks(
        q, k, weights.proj_q, weights.proj_k, sparsity=sparsity, layout="BNHD", backend=backend
    )
    generator = torch.Generator().manual_seed(seed)
    query_blocks = block_count(q.shape[1], Q_BLOCK)
    # the last block is the ragged one
    rows = sorted({query_blocks - 1, *torch.randperm(query_blocks, generator=generator)[:blocks].tolist()})
    difference = norm = 0.0
    wrong = taken = 0
    for head in torch.randperm(q.shape[2], generator=generator)[:heads].tolist():
        index = slice(head, head + 1)
        q_head, k_head, v_head = (x[:, :, index].transpose(1, 2) for x in (q, k, v))
        mine = weights.heads(index)
        chosen = {"key_blocks": selected[:, index], "query_blocks": rows}
        linear = alpha != NO_LINEAR_BRANCH
        expected, _ = sla2_reference(q_head, k_head, v_head, alpha=mine.alpha, linear_branch=linear, **chosen)
        tokens = torch.cat([torch.arange(r * Q_BLOCK, min((r + 1) * Q_BLOCK, q.shape[1])) for r in rows])
        got = first[:, tokens.to(q.device), head].double()
        difference += float((got - expected[:, 0]).square().sum())
        norm += float(expected.square().sum())
        scores = router_scores(q_head.double(), k_head.double(), mine.proj_q, mine.proj_k)[:, :, rows]
        count = selected_block_count(sparsity, block_count(k.shape[1], K_BLOCK))
        best = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, top_k_blocks(scores, count).long(), True)
        hits = best.gather(-1, selected[:, index][:, :, rows].long())
        wrong, taken = wrong + int((~hits).sum()), taken + hits.numel()
    error = (difference / norm) ** 0.5
    return Check(error, wrong / taken, repeatable, slack * TOLERANCE[precision])
