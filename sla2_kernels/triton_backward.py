"""The backward pass in Triton (SLA2, Alg. 3): 16-bit gradients on the forward's selection, from the original Q, K and V.

Nothing of the forward but the selection and the ratios is kept: the log-sum-exp is computed again in 16 bit, so that
P, its row sums and the gradients agree whatever format the forward had. One walk over the selected pairs by query block
gives dQ; then the linear branch, per group of heads in one reused workspace: h_j -> H_i -> dH_i (in place) -> dh_j (in
h_j's place); then one walk by key block gives dK and dV.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F

from .kernels.backward_configs import backward_config
from .kernels.backward_keys import key_gradients, selecting_blocks
from .kernels.backward_linear import linear_keys, linear_queries
from .kernels.backward_queries import query_gradient
from .kernels.configs import product_config
from .kernels.hopper import takes_hopper_linear, takes_hopper_walks
from .kernels.masked_sum import masked_sum
from .kernels.pack import pack
from .kernels.pool import pools, smooth
from .kernels.select import new_mask, unselected_mask
from .router import K_BLOCK, Q_BLOCK, block_count
from .support import capability, on_device
from .triton_backend import Workspace, _head_groups


def attention_backward(
    q, k, v, grad_out, key_blocks, ratio, grad_q, grad_k, grad_v, *, scale, linear_branch=True, query_block=Q_BLOCK
):
    """Fills grad_q (B, H, N, D), any stride, grad_k and grad_v (B, H, M, D), contiguous in either layout; returns d loss / d
    ratio, (B, H, T_m) float32.

    Args:
        q, grad_out: (B, H, N, D); k, v: (B, H, M, D); one dtype, any stride.
        key_blocks: int32 (B, H, T_m, n), the forward's selection. ratio: float32 (B, H, N), the forward's ratios.
        scale: softmax scale. linear_branch: False where the forward had none.
        query_block: query rows that share a selection.
    """
    with on_device(q.device):
        selected, ratio = key_blocks.flatten(0, 1).contiguous(), ratio.contiguous()
        blocks = block_count(k.shape[2], K_BLOCK)
        config = backward_config(
            capability(q.device), q.element_size(), _workspace_dtype(q.dtype).itemsize, query_block
        )
        scales = {"scale": scale, "scale_log2": scale * math.log2(math.e), "query_block": query_block}
        k_mean = smooth(pools(k).k, k.shape[2])
        shift, delta = (torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) for _ in range(2))
        walk_queries, walk_keys = _walks(q, k, v, grad_out, k_mean, config)
        walk_queries(q, k, v, grad_out, grad_q, selected, ratio, shift, delta, **scales)
        correction, grad_ratio = None, torch.zeros(selected.shape[:2], dtype=torch.float32, device=q.device)
        if linear_branch and selected.shape[2] < blocks:
            correction, product = _linear_branch(
                q, k, v, grad_out, selected, ratio, delta, k_mean, grad_q, grad_k, grad_v, query_block, config.linear
            )
            # d loss / d alpha = dO (O_s - O_l), and delta is the first product
            rows = F.pad((delta - product).flatten(0, 1), (0, -q.shape[2] % query_block))
            grad_ratio = rows.unflatten(1, (-1, query_block)).sum(dim=2)
        transposed = selecting_blocks(selected, blocks)
        walk_keys(q, k, v, grad_out, grad_k, grad_v, transposed, shift, delta, correction, **scales)
    return grad_ratio.unflatten(0, q.shape[:2])


def _walks(q, k, v, grad_out, k_mean, config):
    """The two walks over selected pairs that such tensors take."""
    if takes_hopper_walks(capability(q.device), q, k, v, grad_out):
        from .kernels.hopper_backward import hopper_key_gradients, hopper_query_gradient

        return hopper_query_gradient, hopper_key_gradients
    walk_queries = partial(query_gradient, k_mean=k_mean, config=config.queries)
    return walk_queries, partial(key_gradients, config=config.keys)


def _workspace_dtype(dtype):
    # dH_i grows with the gradient's scale and 1 / (phi(Q) Z), more than float16 can be trusted to hold
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _linear_branch(q, k, v, grad_out, selected, ratio, row_delta, k_mean, grad_q, grad_k, grad_v, query_block, config):
    """Writes the linear branch's gradients; returns the mean over tokens of its dK, float32 (B * H, D), and
    rowsum(dO O_l), float32 (B, H, N)."""
    blocks, q_blocks, head_dim = block_count(k.shape[2], K_BLOCK), selected.shape[1], q.shape[3]
    dtype = _workspace_dtype(q.dtype)
    unselected, transposed = _masks(selected, blocks, dtype)

    columns = (head_dim + 1) * head_dim
    groups = _head_groups(q, (blocks + q_blocks) * columns * dtype.itemsize)
    size = groups[0].stop
    sums = torch.empty(size, blocks, columns, dtype=dtype, device=q.device)
    query_sums = torch.empty(size, q_blocks, columns, dtype=dtype, device=q.device)
    row_product = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    on_hopper = takes_hopper_linear(capability(q.device), q, k, v, grad_out, grad_q, grad_k, grad_v)
    tiles = block_count(k.shape[2], K_BLOCK if on_hopper else config.keys)
    tile_totals = torch.empty(len(selected), tiles, head_dim, dtype=torch.float32, device=q.device)
    if on_hopper:
        from .kernels.hopper_linear import hopper_linear_keys as of_keys
        from .kernels.hopper_linear import hopper_linear_queries as of_queries
        from .kernels.hopper_linear import hopper_linear_sums as key_sums
        from .kernels.hopper_product import hopper_product as product
    else:
        of_queries, of_keys = partial(linear_queries, config=config), partial(linear_keys, config=config)
        product = partial(masked_sum, config=product_config(capability(q.device), dtype.itemsize))
        key_sums = _key_sums
    # h_j is divided by the block's tokens, and each masked sum by the number of its terms: this undoes the second
    factor = q_blocks / (blocks * K_BLOCK)
    for group in groups:
        key_sums(k, v, k_mean, sums, group)
        product(unselected, sums, query_sums, group)
        of_queries(q, grad_out, grad_q, query_sums, ratio, row_delta, row_product, group, query_block=query_block)
        product(transposed, query_sums, sums, group)
        of_keys(k, v, k_mean, grad_k, grad_v, sums, tile_totals, group, factor=factor)
    return tile_totals.sum(dim=1) / k.shape[2], row_product


def _key_sums(k, v, k_mean, sums, group):
    work = Workspace(sums=sums, norms=sums[..., k.shape[3] ** 2 :])
    pack(k, v, k_mean, work, group, "16bit", "16bit")


def _masks(selected, blocks, dtype):
    """1 - M_c, (B * H, T_m, T_n), and its transpose, rows of both at 16-byte boundaries."""
    unselected = unselected_mask(selected, blocks, dtype)
    transposed = new_mask((len(selected), blocks), selected.shape[1], dtype, selected.device)
    transposed.copy_(unselected.transpose(1, 2))
    return unselected, transposed
