"""Routing from block means alone: for processes that hold parts of a sequence, and exchange the means instead of the tokens."""

from dataclasses import dataclass

from torch import Tensor

from . import router
from .arguments import check_options, checked_sparsity
from .router import K_BLOCK, Q_BLOCK, block_count, selected_block_count
from .selection import RoutedBlocks
from .support import on_device, resolve_backend


@dataclass(frozen=True)
class PoolRouting:
    """What select_key_blocks() does in two steps: block means of stretches of tokens, then the selection from all of them.

    proj_q, proj_k: of all heads, and the rest as in :func:`sla2_kernels.select_key_blocks`. Where each mean is taken of a
    whole block, the selection is that of select_key_blocks() bit by bit. Raises ValueError as that does.
    """

    sparsity: float
    proj_q: Tensor | None = None
    proj_k: Tensor | None = None
    keep_diagonal: bool = False
    backend: str = "auto"
    query_block: int = Q_BLOCK

    def __post_init__(self):
        checked_sparsity(self.sparsity)
        check_options("BHND", self.backend, query_block=self.query_block)

    def pools(self, x, block):
        """Means over blocks of ``block`` tokens, (B, H, N, D), any stride -> (B, H, T, D) float32 (float64 for float64)."""
        if not self.takes_triton(x):
            return router.pool_blocks(x, block)
        from .kernels.pool import block_means

        with on_device(x.device):
            return block_means(x, block).unflatten(0, x.shape[:2])

    def key_blocks(self, q_pools, k_pools, tokens, heads, dtype):
        """RoutedBlocks of the heads in the slice ``heads``, (B, those heads, T_m, n).

        Args:
            q_pools, k_pools: (B, those heads, T, D), what pools() gives of all blocks of query_block queries and of 64 keys.
            tokens: of the whole sequence. dtype: of the tensors that were pooled.
        """
        count = selected_block_count(self.sparsity, block_count(tokens, K_BLOCK))
        proj_q, proj_k = (p if p is None or p.dim() == 2 else p[heads] for p in (self.proj_q, self.proj_k))
        diagonal = 0 if self.keep_diagonal else None
        if self.takes_triton(q_pools, dtype):
            from .triton_backend import route_pools as route
        else:
            route = router.route_pools
        return RoutedBlocks(route(q_pools, k_pools, tokens, proj_q, proj_k, count, diagonal, self.query_block))

    def takes_triton(self, x, dtype=None):
        """Whether the Triton kernels take x (..., D), or the tensor in ``dtype`` that x was pooled from."""
        return resolve_backend(self.backend, x.device, dtype or x.dtype, x.shape[3], "16bit").name == "triton"
