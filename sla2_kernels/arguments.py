"""Argument checks of the operator's public functions: one sentence with the argument, its value and what is expected.

The contents of tensors are checked on the CPU only: on a GPU reading them would wait for all queued work.
"""

import math
import operator

import torch
from torch.autograd import forward_ad

from .router import QUERY_BLOCKS
from .support import BACKENDS, PRECISIONS

LAYOUTS = ("BHND", "BNHD")
HEADS_DIM = {"BHND": 1, "BNHD": 2}
TOKENS_DIM = {"BHND": 2, "BNHD": 1}
_TRACING = torch._C._TorchDispatchModeKey


def check_options(layout, backend="auto", precision="16bit", query_block=QUERY_BLOCKS[0]):
    """Raises ValueError for a name, or a number of query tokens, that is not among those there are."""
    if layout not in LAYOUTS:
        raise ValueError(f'layout must be "BHND" or "BNHD", got {layout!r}.')
    if precision not in PRECISIONS:
        raise ValueError(f'precision must be "16bit", "int8" or "fp8", got {precision!r}.')
    if backend not in BACKENDS:
        raise ValueError(f'backend must be "auto", "triton" or "torch", got {backend!r}.')
    if not isinstance(query_block, int) or query_block not in QUERY_BLOCKS:
        raise ValueError(f"query_block must be 128 or 64, got {_shown(query_block)}.")


def checked_sparsity(sparsity):
    """sparsity as a float; raises ValueError unless it is a number, 0 <= sparsity < 1."""
    number = _number(sparsity)
    if number is None or not 0 <= number < 1:
        raise ValueError(f"sparsity must be at least 0 and below 1, got {_shown(sparsity)}.")
    return number


def checked_scale(scale, head_dim):
    """The softmax scale as a float, head_dim ** -0.5 for None; raises ValueError unless it is a finite number above 0."""
    if scale is None:
        return head_dim**-0.5
    number = _number(scale)
    # not math.isfinite: torch.compile cannot trace it for a scale that changes between calls
    if number is None or not 0 < number < math.inf:
        raise ValueError(f"scale must be a finite number above 0, got {_shown(scale)}.")
    return number


def checked_count(name, value):
    """value as an integer; raises ValueError for anything else."""
    is_flag = isinstance(value, bool)  # an int to Python, and refused by torch as a length
    if isinstance(value, int) and not is_flag:
        return value
    try:
        return operator.index(None if is_flag else value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {_shown(value)}.") from None


def checked_pair(name, pair):
    """A pair as two integers; raises ValueError for anything else, and below 0."""
    try:
        first, last = pair
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be two integers, at the start and at the end, got {_shown(pair)}.") from None
    first, last = checked_count(name, first), checked_count(name, last)
    if first < 0 or last < 0:
        raise ValueError(f"{name} must be two integers of at least 0, got {first} and {last}.")
    return first, last


def checked_ranges(name, ranges):
    """Ranges as a tuple of (start, stop) in integers, none for None; raises ValueError for anything else."""
    try:
        pairs = [(start, stop) for start, stop in (() if ranges is None else ranges)]
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be pairs (start, stop), got {_shown(ranges)}.") from None
    return tuple((checked_count(name, start), checked_count(name, stop)) for start, stop in pairs)


def check_dimensions(name, tensor, layout):
    """Raises ValueError unless tensor is one of four dimensions."""
    _check_tensor(name, tensor, f"of 4 dimensions ({layout})")
    if tensor.dim() != 4:
        raise ValueError(f"{name} must have 4 dimensions ({layout}), got shape {tuple(tensor.shape)}.")


def check_inputs(layout, **tensors):
    """q, k and v (or q and k alone) by name, in ``layout``; raises ValueError where they do not fit together."""
    for name, tensor in tensors.items():
        check_dimensions(name, tensor, layout)
        q = tensors["q"]
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"q, k and v must share one dtype and device; q is {q.dtype} on {q.device}, {name} is {tensor.dtype} on {tensor.device}."
            )
        if 0 in tensor.shape:
            raise ValueError(f"{name} is empty: shape {tuple(tensor.shape)}.")
    q, k, v = tensors["q"], tensors["k"], tensors.get("v")
    if not q.dtype.is_floating_point or q.dtype.itemsize < 2:
        raise ValueError(f"q, k and v must be float16, bfloat16, float32 or float64, got {q.dtype}.")
    if v is not None and k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}.")
    heads = HEADS_DIM[layout]
    if (q.shape[0], q.shape[heads], q.shape[3]) != (k.shape[0], k.shape[heads], k.shape[3]):
        raise ValueError(
            f"q and k must agree in batch, heads and head_dim ({layout}), got {tuple(q.shape)} and {tuple(k.shape)}."
        )


def check_diagonal(q, k):
    """keep_diagonal: raises ValueError unless there are as many keys as queries."""
    if q.shape != k.shape:
        raise ValueError(f"keep_diagonal needs as many keys as queries, got {tuple(k.shape)} and {tuple(q.shape)}.")


def check_projections(proj_q, proj_k, q, layout):
    """Raises ValueError unless each is None or finite real numbers, (D, D) or (H, D, D) for the heads of q."""
    heads, head_dim = q.shape[HEADS_DIM[layout]], q.shape[3]
    expected = f"({head_dim}, {head_dim}) or ({heads}, {head_dim}, {head_dim})"
    for name, proj in (("proj_q", proj_q), ("proj_k", proj_k)):
        if proj is None:
            continue
        _check_weight(name, proj, ((head_dim, head_dim), (heads, head_dim, head_dim)), expected, q)


def check_linear_projection(proj_l, q):
    """Raises ValueError unless proj_l is None or (weight (D, D), bias (D,)) of finite real numbers, D being q's."""
    if proj_l is None:
        return
    head_dim = q.shape[3]
    if not isinstance(proj_l, (tuple, list)) or len(proj_l) != 2:
        raise ValueError(f"proj_l must be a pair (weight, bias) of tensors, got {_shown(proj_l)}.")
    _check_weight("proj_l's weight", proj_l[0], ((head_dim, head_dim),), f"({head_dim}, {head_dim})", q)
    _check_weight("proj_l's bias", proj_l[1], ((head_dim,),), f"({head_dim},)", q)


def check_alpha(alpha, q, layout):
    """Raises ValueError unless alpha is None or real numbers from 0 to 1, (H,) or (H, knots) for the heads of q."""
    if alpha is None:
        return
    heads = q.shape[HEADS_DIM[layout]]
    expected = f"({heads},) or ({heads}, knots)"
    _check_tensor("alpha", alpha, expected)
    if alpha.dim() not in (1, 2) or alpha.shape[0] != heads or alpha.numel() == 0:
        raise ValueError(f"alpha must be {expected}, got {tuple(alpha.shape)}.")
    if alpha.is_complex():
        raise ValueError(f"alpha must hold real numbers, got {alpha.dtype}.")
    _check_has_values("alpha", alpha, q)
    if _may_read(alpha):
        lowest, highest = (bound.item() for bound in alpha.detach().float().aminmax())
        if not (lowest >= 0 and highest <= 1):
            raise ValueError(f"alpha must lie in 0 to 1, but {lowest if not lowest >= 0 else highest:g} is among it.")


def check_selection(q, k, proj_q, proj_k, layout, backend, query_block):
    """What choosing key blocks needs: raises ValueError where q, k or the projections do not fit together."""
    check_options(layout, backend, query_block=query_block)
    check_inputs(layout, q=q, k=k)
    check_projections(proj_q, proj_k, q, layout)


def check_sample(rows, fitted, q, tokens):
    """Raises ValueError unless rows are int32 (R,) on q's device, R a power of two from 16, each one of q's ``tokens``, and
    ``fitted`` of them can decide a ratio. Returns ``fitted`` as an integer."""
    _check_tensor("rows", rows, "of int32, (R,)")
    if rows.dtype != torch.int32 or rows.dim() != 1 or rows.shape[0] < 16 or rows.shape[0] & (rows.shape[0] - 1):
        raise ValueError(
            f"rows must be int32 (R,), R a power of two from 16, got {str(rows.dtype).removeprefix('torch.')} {tuple(rows.shape)}."
        )
    if rows.device != q.device:
        raise ValueError(f"rows must lie on q's device {q.device}, got {rows.device}.")
    fitted = checked_count("fitted", fitted)
    if not 1 <= fitted <= rows.shape[0]:
        raise ValueError(f"fitted must lie between 1 and the {rows.shape[0]} rows, got {fitted}.")
    if _may_read(rows):
        lowest, highest = rows.numpy().min(), rows.numpy().max()
        if lowest < 0 or highest >= tokens:
            raise ValueError(
                f"rows must lie in 0 to {tokens - 1}, but {lowest if lowest < 0 else highest} is among them."
            )
    return fitted


def check_key_blocks(key_blocks, rows, key_block_count, device):
    """Raises ValueError unless key_blocks are distinct integers from 0 to key_block_count - 1, ``rows`` x n, on ``device``."""
    _check_tensor("key_blocks", key_blocks, f"of int32 or int64, {rows} x n")
    if key_blocks.device != device:
        raise ValueError(f"key_blocks must lie on q's device {device}, got {key_blocks.device}.")
    if key_blocks.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"key_blocks must be int32 or int64, got {key_blocks.dtype}.")
    if key_blocks.dim() != 4 or tuple(key_blocks.shape[:3]) != rows or not 1 <= key_blocks.shape[3] <= key_block_count:
        raise ValueError(
            f"key_blocks must be {rows} x n with n from 1 to {key_block_count}, got {tuple(key_blocks.shape)}."
        )
    if _may_read(key_blocks):
        ordered = key_blocks.sort(dim=-1).values
        if ordered[..., 0].min() < 0 or ordered[..., -1].max() >= key_block_count:
            raise ValueError(f"key_blocks must lie in 0 to {key_block_count - 1}.")
        if (ordered[..., 1:] == ordered[..., :-1]).any():
            raise ValueError("key_blocks must not name a key block twice for one query block.")


def refuse_transforms(*tensors):
    """Raises NotImplementedError where a tensor carries a tangent of forward-mode AD, as dense attention does, or is
    differentiated by torch.func, which takes no operator that Python code defines."""
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(
            "sla2_attention has no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad): "
            "use reverse mode, backward() or torch.autograd.grad."
        )
    if not torch.compiler.is_compiling() and any(
        x is not None and x.requires_grad and torch._C._functorch.is_gradtrackingtensor(x) for x in tensors
    ):
        raise NotImplementedError(
            "sla2_attention cannot be differentiated by torch.func (grad, vjp, jacrev): use backward() or torch.autograd.grad."
        )


def _number(value):
    """value as a float, or None where it is not a real number. Tensors and arrays of one element count as numbers."""
    if isinstance(value, (float, torch.SymFloat)):
        return value
    if isinstance(value, (str, bytes, bytearray)):
        return None
    if isinstance(value, torch.Tensor) and (value.numel() != 1 or value.is_complex() or value.device.type == "meta"):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _shown(value):
    """How an error message shows a value: short, and on one line."""
    if isinstance(value, torch.Tensor) and value.numel() != 1:
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 60 and text.isprintable() else f"a {type(value).__name__}"


def _check_tensor(name, value, expected):
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name} must be a tensor {expected}, got {_shown(value)}.")
    if not torch.compiler.is_compiling() and (value.layout != torch.strided or value.is_nested):
        kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise ValueError(f"{name} must be a dense tensor, got {kind}: call to_dense() or pad it.")


def _check_has_values(name, weight, q):
    """A weight on the meta device where q is not: torch would return memory that nobody wrote."""
    if weight.device.type == "meta" and q.device.type != "meta":
        raise ValueError(f"{name} must hold values, but lies on the meta device: load it first.")


def _check_weight(name, tensor, shapes, expected, q):
    _check_tensor(name, tensor, expected)
    # not "in", which torch.compile traces as False after a set of sizes (findings/torch_compile_size_in_set.sh)
    if not any(tensor.shape == shape for shape in shapes):
        raise ValueError(f"{name} must be {expected}, got {tuple(tensor.shape)}.")
    if tensor.is_complex():
        raise ValueError(f"{name} must hold real numbers, got {tensor.dtype}.")
    _check_has_values(name, tensor, q)
    if _may_read(tensor) and not _is_finite(tensor):
        raise ValueError(f"{name} must hold finite numbers, but NaN or infinity is among them.")


def _may_read(tensor):
    """Whether a check may read the contents: not on a GPU, and not of a fake tensor or beside one, under vmap or while tracing."""
    return (
        tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and not torch._C._functorch.is_batchedtensor(tensor)
        and all(torch._C._get_dispatch_mode(mode) is None for mode in (_TRACING.PROXY, _TRACING.FAKE))
    )


def _is_finite(tensor):
    # a sum needs one pass and no mask; only where the sum itself overflows is the second check needed
    return math.isfinite(tensor.detach().float().sum()) or bool(torch.isfinite(tensor).all())
