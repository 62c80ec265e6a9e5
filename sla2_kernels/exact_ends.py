"""Sparse attention of a video's tokens between text, reference or pose tokens whose attention stays exact.

The keys of those tokens are attended by every query, and their own queries attend every key. They stand at one or both ends of
the sequence: before the video's tokens (prefix) or after them (suffix).
"""

from .arguments import TOKENS_DIM, checked_sparsity
from .forced_blocks import select_with_forced_blocks
from .router import Q_BLOCK
from .selection import RoutedBlocks, forced_block_counts


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
    """What ``attend`` returns for the video's queries, with the keys at both ends exact; see with_exact_rows().

    Args:
        attend: sla2_attention, fitted_attention or sla_attention, its other arguments bound.
        q: the queries of the video alone. k, v: all keys and values. See :func:`sla2_kernels.sla2_attention`.
        key_prefix, key_suffix: keys before and after the video's.
        sparsity: share of the video's key blocks that is skipped, 0 to below 1.
        options: for ``attend``, ``room`` among them; the rest as in :func:`sla2_kernels.forced_blocks.select_with_forced_blocks`.
    """
    sparsity = checked_sparsity(sparsity)
    routing = {"sparsity": sparsity, "layout": layout, "backend": backend, "keep_diagonal": keep_diagonal}
    routing["query_block"] = query_block
    forced = forced_block_counts(k.shape[TOKENS_DIM[layout]], key_prefix, key_suffix)
    if keep_diagonal and not forced.has_room_for_own(sparsity):
        # among blocks that must be taken the operator prefers the first ones, and own ones might be too many
        blocks = select_with_forced_blocks(q, k, proj_q, proj_k, front=key_prefix, back=key_suffix, **routing)
        options["key_blocks"] = RoutedBlocks(blocks)
    else:
        options["exact_keys"] = key_prefix, key_suffix
    return attend(q, k, v, proj_q=proj_q, proj_k=proj_k, **routing, **options)


def with_exact_rows(out, dense, *, tokens, prefix, suffix, axis):
    """``out`` with what ``dense(slice)`` computes of the queries at both ends of all ``tokens`` written to it.

    out: of attend_video() with room=(prefix, suffix). prefix, suffix: queries before and after the video's. axis: the token
    dimension of ``out``.
    """
    for start, count in ((0, prefix), (tokens - suffix, suffix)):
        if count:
            out.narrow(axis, start, count).copy_(dense(slice(start, start + count)))
    return out
