"""The sums of softmax attention by key block that training a router needs, by kernels, for 16-bit tensors on a GPU with Triton."""

import torch

from .support import on_device, resolve_backend


def why_no_kernels(q, k, v):
    """None where kernels take such tensors (..., D), else one sentence why not."""
    if not (q.dtype == k.dtype == v.dtype and q.dtype in (torch.float16, torch.bfloat16)):
        return "q, k and v are not of one 16-bit format"
    return resolve_backend("auto", q.device, q.dtype, q.shape[-1], "16bit").why_not_triton


def largest_scores(q, k, scale):
    """float32 (G, rows), times log2 e. q (G, rows, D), contiguous; k (G, M, D), any stride."""
    from .kernels.key_block_sums import largest_scores

    with on_device(q.device):
        return largest_scores(q, k, scale)


def key_block_sums(q, k, v, largest, scale, mass):
    """The values of a few query rows; their masses are written to ``mass``.

    Args:
        q: (G, rows, D), contiguous; k, v: (G, M, D), any stride. largest: of largest_scores(). scale: softmax scale.
        mass: float32 (G, rows, T_n), adjacent key blocks, to be written: sum over a key block of exp(S - largest).

    Returns:
        float32 (T_n, G, rows, D): the same sums of exp(S - largest) V.
    """
    from .kernels.key_block_sums import key_block_sums

    value = torch.empty(mass.shape[2], *q.shape, dtype=torch.float32, device=q.device)
    with on_device(q.device):
        key_block_sums(q, k, v, largest, scale, mass, value)
    return value
