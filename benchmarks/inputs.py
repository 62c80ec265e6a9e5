"""Q, K, V to time with: random ones, and ones that route as a video model's do.

All tensors are (B, N, H, D) views of (B, N, H * D) memory, as ComfyUI hands them to its attention functions.
"""

import math
from dataclasses import dataclass

import torch

KINDS = ("random", "local", "clustered")
# how far a query looks, in frames, rows and columns, for the data kind "local"
REACH = (1.5, 4.0, 8.0)


@dataclass(frozen=True)
class Shape:
    """One attention call: name, batch, heads, head_dim and the (t, h, w) token grid."""

    name: str
    heads: int
    grid: tuple[int, int, int]
    batch: int = 1
    head_dim: int = 128

    @property
    def tokens(self):
        return math.prod(self.grid)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("1.3B-480p", 12, (21, 30, 52)),
        Shape("14B-720p", 40, (21, 45, 80)),
        Shape("tiny", 2, (3, 10, 20), head_dim=32),
    )
}


def shape_of_length(tokens, heads=12, head_dim=128):
    """A shape of ``tokens`` tokens in frames of 32 x 32 (the last frame is full: tokens must be a multiple of 1,024)."""
    if tokens % 1024:
        raise ValueError(f"a sweep's token counts must be multiples of 1,024, got {tokens}.")
    return Shape(f"{tokens} tokens", heads, (tokens // 1024, 32, 32), head_dim=head_dim)


def find_shape(name):
    """The shape of that name, or of that many tokens."""
    if name in SHAPES:
        return SHAPES[name]
    if name.isdigit():
        return shape_of_length(int(name))
    raise ValueError(f"shape must be one of {', '.join(SHAPES)}, or a number of tokens, got {name!r}.")


def make_inputs(shape, kind="random", *, seed=0, device="cuda", dtype=torch.bfloat16):
    """q, k, v of ``shape``.

    kind: "random": Gaussian; every selection is as likely as any other. "local": keys near a query in (t, h, w) score
    highest, so neighbouring query blocks share key blocks. "clustered": blocks belong to clusters of uneven size, and
    heads differ in how sharply they attend, so that some key blocks are wanted by many rows and most by few.
    """
    if kind not in KINDS:
        raise ValueError(f"data must be one of {', '.join(KINDS)}, got {kind!r}.")
    generator = torch.Generator(device=device).manual_seed(seed)
    size = (shape.batch, shape.tokens, shape.heads * shape.head_dim)
    q, k, v = (
        torch.empty(size, device=device, dtype=dtype).unflatten(-1, (shape.heads, shape.head_dim)) for _ in range(3)
    )
    for x in (q, k, v):
        for head in range(shape.heads):
            x[:, :, head] = _noise((shape.batch, shape.tokens, shape.head_dim), generator)
    if kind != "random":
        add = _add_local if kind == "local" else _add_clusters
        for head in range(shape.heads):
            add(q[:, :, head], k[:, :, head], shape, generator)
    return q, k, v


def _noise(size, generator):
    return torch.randn(size, device=generator.device, generator=generator)


def _add_local(q, k, shape, generator):
    """Adds random Fourier features of the token's place to q and k (B, N, D): q . k falls with the distance."""
    axes = torch.meshgrid(*(torch.arange(n, device=q.device, dtype=torch.float32) for n in shape.grid), indexing="ij")
    places = torch.stack([axis.flatten() for axis in axes], dim=-1)
    waves = _noise((3, shape.head_dim // 2), generator) / torch.tensor(REACH, device=q.device)[:, None]
    phase = places @ waves
    features = 2 * torch.cat([phase.cos(), phase.sin()], dim=-1)
    q += features
    k += features


def _add_clusters(q, k, shape, generator):
    """Adds one of 48 centres to each run of 64 tokens of q and k (B, N, D); low-numbered clusters are larger."""
    centres = _noise((48, shape.head_dim), generator)
    blocks = -(-shape.tokens // 64)
    sharpness = 1 + torch.rand(1, device=q.device, generator=generator)
    for x in (q, k):
        cluster = (48 * torch.rand(blocks, device=x.device, generator=generator).square()).long()
        x += sharpness * centres[cluster].repeat_interleave(64, dim=0)[: shape.tokens]
