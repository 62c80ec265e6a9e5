"""The operator as torch sees it: ``sla2::attention`` and ``sla2::fitted_attention``, with their shapes for tracing.

Arguments have been checked (attention.py, fitted_attention.py). The backend is chosen inside the operator, where torch.compile
does not look: some releases cannot trace the search for an installed Triton.
"""

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from . import gradients, loops, router, torch_backend, torch_fit
from .router import K_BLOCK, Q_BLOCK, block_count, ratio_per_block, selected_beside
from .selection import distinct_blocks
from .support import resolve_backend, without_autocast


class _Call(NamedTuple):
    """One call's tensors as views (B, H, N, D). result: what the operator returns, which holds ``out``.

    key_blocks: ascending, distinct and in range, or None to route.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key_blocks: Tensor | None
    out: Tensor
    result: Tensor


def _prepared(q, k, v, key_blocks, heads_first, is_routed, room):
    # what is returned must not be a view, or a caller could not write into it under autograd
    result = torch.empty(_with_room(q, heads_first, room), dtype=q.dtype, device=q.device)
    out = result
    if not heads_first:
        q, k, v, out = (t.transpose(1, 2) for t in (q, k, v, out))
    if any(room):
        out = out.narrow(2, room[0], q.shape[2])
    if key_blocks is not None and not is_routed:
        key_blocks = distinct_blocks(key_blocks, block_count(k.shape[2], K_BLOCK))
    return _Call(q, k, v, key_blocks, out, result)


def _with_room(q, heads_first, room):
    """Shape of the result: q's, and ``room`` more rows, (before, behind)."""
    shape, tokens = list(q.shape), 2 if heads_first else 1
    shape[tokens] += sum(room)
    return shape


def _torch_selection(call, proj_q, proj_k, sparsity, diagonal, forced, query_block, backend):
    """The key blocks of a call that plain torch computes; records that loop, and why it was chosen, in loops.py."""
    loops.took_loop(loops.TORCH, backend.why_not_triton)
    if call.key_blocks is not None:
        return call.key_blocks
    count = selected_beside(forced, sparsity, block_count(call.k.shape[2], K_BLOCK))
    return router.route(call.q, call.k, proj_q, proj_k, count, diagonal, query_block, forced)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    proj_q: Optional[Tensor],
    proj_k: Optional[Tensor],
    alpha: Optional[Tensor],
    key_blocks: Optional[Tensor],
    sparsity: float,
    precision: str,
    heads_first: bool,
    scale: float,
    backend: str,
    diagonal: Optional[int] = None,
    linear_branch: bool = True,
    is_routed: bool = False,
    before: int = 0,
    behind: int = 0,
    first_forced: int = 0,
    last_forced: int = 0,
    query_block: int = Q_BLOCK,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, ratio per query row, key blocks used, flat); see sla2_attention. is_routed: key_blocks were RoutedBlocks."""
    chosen = resolve_backend(backend, q.device, q.dtype, q.shape[3], precision)
    call = _prepared(q, k, v, key_blocks, heads_first, is_routed, (before, behind))
    ratio, forced = ratio_per_block(alpha, call.q, query_block), (first_forced, last_forced)
    options = {"scale": scale, "precision": precision, "linear_branch": linear_branch, "query_block": query_block}
    if chosen.name == "triton":
        from . import triton_backend

        row_ratio, blocks = triton_backend.attention(
            *call[:3], proj_q, proj_k, call.key_blocks, ratio, call.out,
            sparsity=sparsity, diagonal=diagonal, forced=forced, **options,
        )  # fmt: skip
    else:
        blocks = _torch_selection(call, proj_q, proj_k, sparsity, diagonal, forced, query_block, chosen)
        row_ratio = torch_backend.attention(*call[:3], blocks, ratio, call.out, **options)
    # an operator must not return its own input
    return call.result, row_ratio.float(), blocks.flatten().clone() if is_routed else blocks.flatten()


def _fitted_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    proj_q: Optional[Tensor],
    proj_k: Optional[Tensor],
    key_blocks: Optional[Tensor],
    rows: Tensor,
    fitted: int,
    sparsity: float,
    precision: str,
    heads_first: bool,
    scale: float,
    backend: str,
    diagonal: Optional[int] = None,
    is_routed: bool = False,
    before: int = 0,
    behind: int = 0,
    first_forced: int = 0,
    last_forced: int = 0,
    query_block: int = Q_BLOCK,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, ratio, dense); see fitted_attention. is_routed: key_blocks were RoutedBlocks."""
    chosen = resolve_backend(backend, q.device, q.dtype, q.shape[3], precision)
    call = _prepared(q, k, v, key_blocks, heads_first, is_routed, (before, behind))
    options, forced = {"scale": scale, "precision": precision, "query_block": query_block}, (first_forced, last_forced)
    dense = torch.empty(*call.q.shape[:2], rows.shape[0], q.shape[3], dtype=torch.float32, device=q.device)
    if chosen.name == "triton":
        from . import triton_backend

        ratio = torch.empty(dense.shape[:2], dtype=torch.float32, device=q.device)
        options |= {"sparsity": sparsity, "diagonal": diagonal, "forced": forced}
        options["sample"] = triton_backend.Sample(rows, fitted, dense, ratio)
        triton_backend.attention(*call[:3], proj_q, proj_k, call.key_blocks, None, call.out, **options)
        return call.result, ratio, dense
    blocks = _torch_selection(call, proj_q, proj_k, sparsity, diagonal, forced, query_block, chosen)
    with without_autocast(q.device):
        ratio = torch_fit.fit_ratio(*call[:3], blocks, rows, fitted, dense, scale, query_block)
    per_block = ratio[..., None].expand(-1, -1, blocks.shape[2])
    torch_backend.attention(*call[:3], blocks, per_block, call.out, **options)
    return call.result, ratio.float(), dense


# private names of torch, None where a release lacks one: then every call takes torch's way
_HIDDEN_STATE = [
    getattr(torch._C, "_get_tracing_state", None),
    getattr(torch._C, "_len_torch_dispatch_stack", None),
    getattr(torch._C, "_len_torch_function_stack", None),
    getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", None),
]
_CAN_BE_PLAIN = None not in _HIDDEN_STATE and hasattr(Tensor, "_is_zerotensor")


def _is_plain(tensors):
    """Whether nothing but the operator's own code would see a call with these tensors, or None: no tracing, no gradient, no
    transform, no mode, no subclass, and memory that holds what the tensor means."""
    if torch.compiler.is_compiling() or not _CAN_BE_PLAIN or any(state() for state in _HIDDEN_STATE):
        return False
    needs_gradients = torch.is_grad_enabled()
    for x in tensors:
        if x is None:
            continue
        if type(x) not in (Tensor, torch.nn.Parameter) or x.device.type not in ("cpu", "cuda"):
            return False
        if (needs_gradients and x.requires_grad) or x.is_neg() or x._is_zerotensor():
            return False
    return True


def attention(*arguments):
    """torch.ops.sla2.attention(*arguments), without torch's way to an operator where nothing asks for it: the host's time counts."""
    return (_attention if _is_plain(arguments[:7]) else torch.ops.sla2.attention)(*arguments)


def fitted_attention(*arguments):
    """torch.ops.sla2.fitted_attention(*arguments), likewise."""
    return (_fitted_attention if _is_plain(arguments[:7]) else torch.ops.sla2.fitted_attention)(*arguments)


_attention_operator = torch.library.custom_op("sla2::attention", _attention, mutates_args=())
_fitted_attention_operator = torch.library.custom_op("sla2::fitted_attention", _fitted_attention, mutates_args=())


def _sizes(q, heads_first):
    """(batch, heads, tokens, head_dim) in either layout."""
    return tuple(q.shape) if heads_first else (q.shape[0], q.shape[2], q.shape[1], q.shape[3])


@_attention_operator.register_fake
def _(
    q, k, v, proj_q, proj_k, alpha, key_blocks, sparsity, precision, heads_first, scale, backend, diagonal=None,
    linear_branch=True, is_routed=False, before=0, behind=0, first_forced=0, last_forced=0, query_block=Q_BLOCK,
):  # fmt: skip
    batch, heads, tokens, _ = _sizes(q, heads_first)
    if key_blocks is None:
        count = selected_beside((first_forced, last_forced), sparsity, block_count(_sizes(k, heads_first)[2], K_BLOCK))
    else:
        count = key_blocks.shape[-1]
    return (
        q.new_empty(_with_room(q, heads_first, (before, behind))),
        q.new_empty((batch, heads, tokens), dtype=torch.float32),
        # flat: torch.compile would recompile for every dimension of size 1, and the count may be 1
        q.new_empty(batch * heads * block_count(tokens, query_block) * count, dtype=torch.int32),
    )


@_fitted_attention_operator.register_fake
def _(
    q, k, v, proj_q, proj_k, key_blocks, rows, fitted, sparsity, precision, heads_first, scale, backend, diagonal=None,
    is_routed=False, before=0, behind=0, first_forced=0, last_forced=0, query_block=Q_BLOCK,
):  # fmt: skip
    batch, heads, _, head_dim = _sizes(q, heads_first)
    return (
        q.new_empty(_with_room(q, heads_first, (before, behind))),
        q.new_empty((batch, heads), dtype=torch.float32),
        q.new_empty((batch, heads, rows.shape[0], head_dim), dtype=torch.float32),
    )


_attention_operator.register_autograd(gradients.backward, setup_context=gradients.save_for_backward)
