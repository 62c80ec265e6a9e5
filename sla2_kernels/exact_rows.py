"""Attention of a few query rows over all keys, unquantised: the rows of text and sound beside a video."""

import torch
import torch.nn.functional as F

from .arguments import HEADS_DIM, TOKENS_DIM
from .attention import sla2_attention
from .router import K_BLOCK, Q_BLOCK, block_count
from .selection import RoutedBlocks
from .support import capability, triton_reason


def takes_exact_rows(q, k, v, layout="BHND"):
    """Whether the sparse loop computes such rows, with nothing left out: where it is faster than dense attention.

    That is the 16-bit loop on Hopper (benchmarks/NOTES.md, "Rows of text and sound").
    """
    if q.device.type != "cuda" or triton_reason(q.device, q.dtype, q.shape[3], "16bit") is not None:
        return False
    if layout == "BNHD":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    from .kernels.hopper import takes_hopper_loop

    return takes_hopper_loop(capability(q.device), "16bit", "16bit", q, k, v)


def exact_rows(q, k, v, *, scale=None, layout="BHND", backend="auto"):
    """Softmax attention of q over all keys, in the precision of its dtype.

    Args:
        q: (B, H, R, D), or (B, R, H, D) with layout "BNHD"; any number of rows. k, v: (B, H, M, D) or (B, M, H, D).
        scale: softmax scale, None is D ** -0.5.
        backend: "torch" is PyTorch's attention; otherwise Hopper's 16-bit loop where it can run.

    Returns:
        The output in q's layout and dtype.
    """
    # while torch.compile traces, strides and addresses are not to be asked for
    if backend != "torch" and not torch.compiler.is_compiling() and takes_exact_rows(q, k, v, layout):
        return sla2_attention(
            q,
            k,
            v,
            key_blocks=_all_blocks(q, k, layout),
            precision="16bit",
            scale=scale,
            layout=layout,
            linear_branch=False,
        )
    if layout == "BNHD":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2) if layout == "BNHD" else out


def _all_blocks(q, k, layout):
    """RoutedBlocks that leave nothing out."""
    rows, keys = q.shape[TOKENS_DIM[layout]], k.shape[TOKENS_DIM[layout]]
    blocks = torch.arange(block_count(keys, K_BLOCK), dtype=torch.int32, device=q.device)
    return RoutedBlocks(blocks.expand(q.shape[0], q.shape[HEADS_DIM[layout]], block_count(rows, Q_BLOCK), -1))
