"""sol_attn of comfy-kitchen (ComfyUI core's Model Sparse Attention), for comparison.

It takes query and key blocks of 64 tokens, top-k by pooled scores, and always adds the diagonal block and its neighbours.
At a few thousand tokens those are as many as the top-k itself, so a fair comparison counts them.
"""

import torch

BLOCK = 64


def load():
    """The eager function, or ImportError."""
    from comfy_kitchen.backends.eager.sol_attn import sol_attn

    return sol_attn


def load_compiled():
    """The compiled function, or ImportError with the reason."""
    import comfy_kitchen

    if not hasattr(comfy_kitchen, "sol_attn"):
        raise ImportError(f"comfy_kitchen {getattr(comfy_kitchen, '__version__', '')} has no sol_attn")
    if not comfy_kitchen.sol_attn_is_available(torch.device("cuda")):
        raise ImportError("comfy_kitchen's compiled sol_attn does not run on this device")
    return comfy_kitchen.sol_attn


def _scores(q, k):
    """Pooled scores (B, H, T, T) of (B, N, H, D) tensors."""

    def pool(x):
        whole = x.shape[1] // BLOCK * BLOCK
        means = x[:, :whole].unflatten(1, (-1, BLOCK)).float().mean(dim=2)
        if whole < x.shape[1]:
            means = torch.cat([means, x[:, whole:].float().mean(dim=1, keepdim=True)], dim=1)
        return means.transpose(1, 2)

    q, k = pool(q), pool(k)
    return q @ (k - k.mean(dim=2, keepdim=True)).transpose(-1, -2)


def kept_share(q, k, count):
    """Share of block pairs computed exactly with ``count`` blocks of top-k: those, the diagonal and its neighbours."""
    return _kept(_scores(q, k), count)


def _kept(scores, count):
    exact = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(count, dim=-1).indices, True)
    place = torch.arange(scores.shape[-1], device=scores.device)
    return float((exact | ((place[:, None] - place).abs() <= 1)).float().mean())


def equal_count(q, k, share):
    """The top-k count at which sol_attn keeps at most ``share`` of the block pairs in all; at least 1."""
    scores = _scores(q, k)
    count = max(1, int(share * scores.shape[-1] + 1e-6))
    while count > 1 and _kept(scores, count) > share:
        count -= 1
    return count
