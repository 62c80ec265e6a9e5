"""Inputs and measures that the operator's tests share."""

from dataclasses import dataclass, field

import torch

from sla2_kernels.reference import sla2_reference


@dataclass
class Inputs:
    """One call of the operator: q, k, v as (B, H, N, D), the router's weights and the options."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    proj_q: torch.Tensor | None = None
    proj_k: torch.Tensor | None = None
    alpha: torch.Tensor | None = None
    options: dict = field(default_factory=dict)

    def tensors(self):
        return self.q, self.k, self.v, self.proj_q, self.proj_k, self.alpha

    def reference(self, key_blocks=None):
        """(out, ratio) of the definition, on the selection that the call itself used."""
        options = {"sparsity": 0.97, "scale": None, "query_block": 128} | self.options
        return sla2_reference(*self.tensors(), key_blocks=key_blocks, **options)


def normal(generator, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=generator).to(dtype)


def projection(generator, kind, heads, head_dim):
    """A router projection: kind None, "shared" (D, D) or "per head" (H, D, D)."""
    if kind is None:
        return None
    shape = (head_dim, head_dim) if kind == "shared" else (heads, head_dim, head_dim)
    return normal(generator, *shape) / head_dim**0.5


def mixing_ratio(generator, knots, heads):
    """alpha: knots None, 0 for (H,), or a number of knots for (H, A); in (0.1, 0.9)."""
    if knots is None:
        return None
    return 0.1 + 0.8 * torch.rand(*((heads, knots) if knots else (heads,)), generator=generator)


def attention_inputs(
    generator, *, batch=1, heads=2, tokens=300, keys=None, head_dim=64, dtype=torch.float32,
    proj=None, knots=0, **options,
):  # fmt: skip
    """Gaussian q, k and v; the keys share an offset, so that forgetting to smooth them shows."""
    keys = tokens if keys is None else keys
    q = normal(generator, batch, heads, tokens, head_dim, dtype=dtype)
    k = normal(generator, batch, heads, keys, head_dim) + 2 * normal(generator, batch, heads, 1, head_dim)
    v = normal(generator, batch, heads, keys, head_dim, dtype=dtype)
    projections = (projection(generator, proj, heads, head_dim) for _ in range(2))
    return Inputs(q, k.to(dtype), v, *projections, mixing_ratio(generator, knots, heads), options)


def embedded(x):
    """The same values as a view inside a larger tensor of NaN, each dimension with a stride of its own."""
    padded = torch.full([size * 2 + 3 for size in x.shape], torch.nan, dtype=x.dtype)
    view = padded[tuple(slice(1, 1 + 2 * size, 2) for size in x.shape)]
    view.copy_(x)
    assert view.stride(-1) == 2 and torch.equal(view, x)
    return view


def relative_error(out, reference):
    """||out - reference|| / ||reference|| in float64; NaN or infinity anywhere makes it so too."""
    out, reference = out.double(), reference.double()
    assert out.shape == reference.shape
    return ((out - reference).norm() / reference.norm()).item()


def assert_same_selection(found, expected, scores):
    """Equal int (B, H, T_m, n) selections; a row may differ only where float64 scores at its cut are within 1e-5."""
    assert found.shape == expected.shape and found.dtype == torch.int32
    assert (found.diff(dim=-1) > 0).all(), "not ascending"
    differs = (found != expected).any(dim=-1)
    if not differs.any():
        return
    lowest = scores.gather(-1, expected.long()).amin(dim=-1)
    lowest_found = scores.gather(-1, found.long()).amin(dim=-1)
    gap = (lowest - lowest_found) / scores.abs().amax(dim=-1)
    assert gap[differs].max() <= 1e-5, f"{int(differs.sum())} rows select other blocks"
