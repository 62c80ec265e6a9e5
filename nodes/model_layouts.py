"""Facts per model family: which modules make the video self-attention calls, in what token order, on what grid.

A new family is a new row of LAYOUTS. A model without a row is passed through.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass


def wan_grid(args, options, patch_size):
    """(t, h, w) token grid of one Wan model call: what the model publishes, else from the latent (B, C, T, H, W)."""
    published = options.get("grid_sizes")
    if published is not None:
        return tuple(int(n) for n in published)
    frames, height, width = args[0].shape[2:]
    appended = args[4] if len(args) > 4 else None  # time_dim_concat: frames joined behind the latent's own
    if appended is not None:
        frames += appended.shape[2]
    return tuple(math.ceil(n / p) for n, p in zip((frames, height, width), patch_size, strict=True))


@dataclass(frozen=True)
class ModelLayout:
    """One row per model class.

    family: the name router files carry. model_class, attention_class: full names, matched exactly (a subclass may order
    its tokens otherwise). blocks, attention: attribute of the model, and of a block, that hold the self-attention.
    token_order: order of the video tokens in the sequence. grid: (t, h, w) of a call, see :func:`wan_grid`.
    """

    family: str
    model_class: str
    blocks: str
    attention: str
    attention_class: str
    token_order: str
    grid: Callable


LAYOUTS = (
    # Wan 2.1 and 2.2, text and image to video, 1.3B, 5B and 14B
    ModelLayout(
        family="wan",
        model_class="comfy.ldm.wan.model.WanModel",
        blocks="blocks",
        attention="self_attn",
        attention_class="comfy.ldm.wan.model.WanSelfAttention",
        token_order="raster",
        grid=wan_grid,
    ),
)


@dataclass(frozen=True)
class ModelFacts:
    """What one loaded model is: its layout, its sizes, and the path of each layer's self-attention module."""

    layout: ModelLayout
    num_layers: int
    num_heads: int
    head_dim: int
    patch_size: tuple
    attention_paths: tuple[str, ...]


def class_name(thing):
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def model_facts(diffusion_model):
    """ModelFacts of a supported diffusion model, else None."""
    layout = next((row for row in LAYOUTS if row.model_class == class_name(diffusion_model)), None)
    if layout is None:
        return None
    blocks = getattr(diffusion_model, layout.blocks)
    paths = [f"{layout.blocks}.{index}.{layout.attention}" for index in range(len(blocks))]
    modules = [operator.attrgetter(path)(diffusion_model) for path in paths]
    if not modules or any(class_name(module) != layout.attention_class for module in modules):
        return None
    return ModelFacts(
        layout=layout,
        num_layers=len(modules),
        num_heads=modules[0].num_heads,
        head_dim=modules[0].head_dim,
        patch_size=tuple(diffusion_model.patch_size),
        attention_paths=tuple(paths),
    )


def unsupported_model_reason(diffusion_model):
    """None, or one sentence why no call of this model can run sparse."""
    if model_facts(diffusion_model) is not None:
        return None
    return f"model family {type(diffusion_model).__name__} is not supported yet"
