"""Sparse attention of a video's tokens between text, reference or pose tokens whose attention stays exact.

The keys of those tokens are attended by every query, and their own queries attend every key. They stand at one or both ends of
the sequence: before the video's tokens (prefix) or after them (suffix).
"""

import torch

from .forced_blocks import select_with_forced_blocks
from .router import Q_BLOCK
from .selection import RoutedBlocks
from .support import without_autocast


def attend_video(
    attend,
    q,
    k,
    v,
    *,
    key_prefix,
    key_suffix,
    proj_q=None,
    proj_k=None,
    sparsity,
    layout="BHND",
    backend="auto",
    keep_diagonal=False,
    query_block=Q_BLOCK,
    **options,
):
    """What ``attend`` returns for the video's queries, with the keys at both ends exact.

    Args:
        attend: sla2_attention, fitted_attention or sla_attention, its other arguments bound.
        q: the queries of the video alone. k, v: all keys and values. See :func:`sla2_kernels.sla2_attention`.
        key_prefix, key_suffix: keys before and after the video's.
        sparsity: share of the video's key blocks that is skipped, 0 to below 1.
        options: for ``attend``; the rest as in :func:`sla2_kernels.forced_blocks.select_with_forced_blocks`.
    """
    routing = {"sparsity": sparsity, "layout": layout, "backend": backend, "keep_diagonal": keep_diagonal}
    routing["query_block"] = query_block
    key_blocks = None
    if key_prefix or key_suffix:
        key_blocks = RoutedBlocks(
            select_with_forced_blocks(q, k, proj_q, proj_k, front=key_prefix, back=key_suffix, **routing)
        )
    return attend(q, k, v, proj_q=proj_q, proj_k=proj_k, key_blocks=key_blocks, **routing, **options)


def with_exact_rows(out, dense, *, tokens, prefix, suffix, axis):
    """The output of all ``tokens`` queries: ``out`` of the video's, and what ``dense(slice)`` computes of those at the ends.

    prefix, suffix: queries before and after the video's. axis: the token dimension of ``out``.
    """
    parts = [out]
    if prefix:
        parts.insert(0, dense(slice(0, prefix)))
    if suffix:
        parts.append(dense(slice(tokens - suffix, tokens)))
    if len(parts) == 1:
        return out
    # under autocast the exact rows may have the other 16-bit dtype, and torch.cat refuses to join the two
    with without_autocast(out.device):
        return torch.cat([part.to(out.dtype) for part in parts], dim=axis)
