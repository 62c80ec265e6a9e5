"""Facts per model family: which modules make the video self-attention calls, and where the video's tokens lie in them.

A new family is a new row of LAYOUTS. A model without a row is passed through.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass

from . import video_tokens as tokens

WAN = "comfy.ldm.wan"
WAN_SELF = f"{WAN}.model.WanSelfAttention"
FLUX = "comfy.ldm.flux.layers"
FLUX_BLOCKS = (("double_blocks.*", f"{FLUX}.DoubleStreamBlock"), ("single_blocks.*", f"{FLUX}.SingleStreamBlock"))
RASTER = "raster"
BLOCKS_SELF = "blocks.*.self_attn"


@dataclass(frozen=True)
class ModelLayout:
    """One row per model class.

    family: the name router files carry. model_class: full name, matched exactly (a subclass may order its tokens
    otherwise). modules: (path, full class name) of what makes one self-attention call when it runs; "*" stands for every
    child; a path may end in the name of a method. prefix: tokens before the video's, see video_tokens.py. grid: (t, h, w) of
    the video's tokens. token_order: their order in the sequence. by_frame: the model attends one frame's queries at a time.
    text_mask: masks of its calls are over text, and the same in every layer. references: which prefix and suffix tokens are
    images or videos, see video_tokens.py. wrapper: the kind of ComfyUI wrapper that is called around the model.
    """

    family: str
    model_class: str
    modules: tuple[tuple[str, str], ...]
    prefix: Callable = tokens.no_prefix
    grid: Callable = tokens.latent_grid
    token_order: str = RASTER
    by_frame: bool = False
    text_mask: bool = False
    references: Callable = tokens.no_references
    wrapper: str = "DIFFUSION_MODEL"


def wan(name, **facts):
    """A Wan variant whose blocks hold Wan's own self-attention."""
    return ModelLayout("wan", f"{WAN}.{name}", ((BLOCKS_SELF, WAN_SELF),), references=tokens.all_beside, **facts)


LAYOUTS = (
    # text and image to video, 1.3B, 5B and 14B, Fun control, Phantom, Bernini's references
    wan("model.WanModel", prefix=tokens.wan_reference),
    ModelLayout(
        "wan-vace",
        f"{WAN}.model.VaceWanModel",
        ((BLOCKS_SELF, WAN_SELF), ("vace_blocks.*.self_attn", WAN_SELF)),
    ),
    wan("model.CameraWanModel"),
    wan("model.WanModel_S2V"),
    wan("model.HumoWanModel"),
    wan("model.SCAILWanModel", prefix=tokens.scail_reference),
    wan("model.SCAIL2WanModel", prefix=tokens.scail_reference),
    wan("model_animate.AnimateWanModel", prefix=tokens.wan_reference),
    ModelLayout(
        "wan",
        f"{WAN}.model_animate2.WanAnimate2Model",
        ((f"{BLOCKS_SELF}.forward_gen", f"{WAN}.model_animate2.WanAnimate2SelfAttention"),),
        prefix=tokens.first_frame,
        grid=tokens.grid_after_first_frame,
        by_frame=True,
    ),
    wan("model_wandancer.WanDancerModel", prefix=tokens.wan_reference),
    ModelLayout("wan", f"{WAN}.ar_model.CausalWanModel", ((BLOCKS_SELF, f"{WAN}.ar_model.CausalWanSelfAttention"),)),
    ModelLayout(
        "hunyuan-video",
        "comfy.ldm.hunyuan_video.model.HunyuanVideo",
        FLUX_BLOCKS,
        prefix=tokens.hunyuan_prefix,
        text_mask=True,
    ),
    ModelLayout(
        "cogvideox",
        "comfy.ldm.cogvideo.model.CogVideoXTransformer3DModel",
        (("blocks.*", "comfy.ldm.cogvideo.model.CogVideoXBlock"),),
        prefix=tokens.video_last,
    ),
    ModelLayout(
        "ltx-video",
        "comfy.ldm.lightricks.model.LTXVModel",
        (("transformer_blocks.*.attn1", "comfy.ldm.lightricks.model.CrossAttention"),),
        grid=tokens.ltx_grid,
        references=tokens.all_beside,
    ),
    ModelLayout(
        "ltx-2",
        "comfy.ldm.lightricks.av_model.LTXAVModel",
        (("transformer_blocks.*.attn1", "comfy.ldm.lightricks.model.CrossAttention"),),
        grid=tokens.ltx_grid,
        references=tokens.all_beside,
    ),
    ModelLayout(
        "mochi",
        "comfy.ldm.genmo.joint_model.asymm_models_joint.AsymmDiTJoint",
        (("blocks.*.attn", "comfy.ldm.genmo.joint_model.asymm_models_joint.AsymmetricAttention"),),
        wrapper="APPLY_MODEL",
    ),
    ModelLayout(
        "cosmos",
        "comfy.ldm.cosmos.model.GeneralDIT",
        (("blocks.*.blocks.0.block.attn", "comfy.ldm.cosmos.blocks.Attention"),),
    ),
    ModelLayout(
        "cosmos-predict2",
        "comfy.ldm.cosmos.predict2.MiniTrainDIT",
        ((BLOCKS_SELF, "comfy.ldm.cosmos.predict2.Attention"),),
    ),
    ModelLayout(
        "kandinsky5",
        "comfy.ldm.kandinsky5.model.Kandinsky5",
        (("visual_transformer_blocks.*.self_attention", "comfy.ldm.kandinsky5.model.SelfAttention"),),
    ),
    ModelLayout(
        "minimax-h3",
        "comfy.ldm.minimax.model.MiniMaxH3Model",
        (("blocks.*.attn", "comfy.ldm.minimax.model.Attention"),),
        prefix=tokens.video_last,
        references=tokens.h3_references,
    ),
    ModelLayout(
        "flux",
        "comfy.ldm.flux.model.Flux",
        FLUX_BLOCKS,
        prefix=tokens.text_prefix,
        text_mask=True,
    ),
    ModelLayout(
        "qwen-image",
        "comfy.ldm.qwen_image.model.QwenImageTransformer2DModel",
        (("transformer_blocks.*.attn", "comfy.ldm.qwen_image.model.Attention"),),
        prefix=tokens.text_prefix,
        text_mask=True,
    ),
)

# models that no override of ComfyUI's attention can reach
UNREACHABLE = {
    "comfy.ldm.seedvr.model.NaDiT": "SeedVR2 calls its attention past every override (and works in small windows already)",
}


@dataclass(frozen=True)
class ModelFacts:
    """What one loaded model is: its layout, its sizes, and the path of each layer's self-attention (module or method)."""

    layout: ModelLayout
    num_layers: int
    num_heads: int
    head_dim: int
    patch_size: tuple
    attention_paths: tuple[str, ...]


def as_it_is(path, thing):
    """The view of a diffusion model that no ModelPatcher has changed."""
    return thing


def class_name(thing, path="", view=as_it_is):
    """Full name of a thing's class. path, view: where it lies in the diffusion model of a MODEL, see view_of."""
    kind = view(f"{path}.__class__".removeprefix("."), type(thing))
    return f"{kind.__module__}.{kind.__qualname__}"


def view_of(patcher):
    """view(path, thing): what this MODEL runs at ``path`` of its diffusion model, where ``thing`` lies in the loaded one.

    The loaded model is shared with other MODELs, and keeps the patches of the last one until another is loaded.
    """

    def view(path, thing):
        name = f"diffusion_model.{path}".removesuffix(".")
        known = patcher.object_patches.get(name, patcher.object_patches_backup.get(name, thing))
        return getattr(known, "_orig_mod", known)  # the module that torch.compile wrapped

    return view


def diffusion_model_of(patcher):
    """The diffusion model that this MODEL runs."""
    return view_of(patcher)("", patcher.model.diffusion_model)


def facts_of(patcher):
    """ModelFacts of a MODEL (ModelPatcher) that is supported, else None."""
    return model_facts(diffusion_model_of(patcher), view_of(patcher))


def unsupported_reason_of(patcher):
    """None, or one sentence why no call of this MODEL can run sparse."""
    return unsupported_model_reason(diffusion_model_of(patcher), view_of(patcher))


def model_facts(diffusion_model, view=as_it_is):
    """ModelFacts of a supported diffusion model, else None. view: of a MODEL, see view_of."""
    name = class_name(diffusion_model, "", view)
    layout = next((row for row in LAYOUTS if row.model_class == name), None)
    if layout is None:
        return None
    found = [
        (path, module, expected)
        for pattern, expected in layout.modules
        for path, module in modules_at(diffusion_model, pattern, view)
    ]
    if not found or any(class_name(module, path, view) != expected for path, module, expected in found):
        return None
    sizes = {head_sizes(module) for _, module, _ in found}
    if len(sizes) > 1:
        return None
    heads, head_dim = sizes.pop()
    return ModelFacts(
        layout=layout,
        num_layers=len(found),
        num_heads=heads,
        head_dim=head_dim,
        patch_size=patch_size(diffusion_model),
        attention_paths=tuple(path for path, _, _ in found),
    )


def modules_at(root, pattern, view=as_it_is):
    """[(path, module)] of "blocks.*.attn"; a last part that is a method belongs to the path of the module before it."""
    found = [("", root)]
    for part in pattern.split("."):
        if part == "*":
            found = [(f"{path}{name}.", child) for path, module in found for name, child in module.named_children()]
        else:
            found = [(f"{path}{part}.", getattr(module, part)) for path, module in found if hasattr(module, part)]
        found = [(path, view(path[:-1], thing)) for path, thing in found]
    return [(path[:-1], getattr(thing, "__self__", thing)) for path, thing in found]


def module_and_method(path, diffusion_model):
    """(module, name of the method that makes its attention call) of one of ModelFacts.attention_paths."""
    thing = operator.attrgetter(path)(diffusion_model)
    if hasattr(thing, "named_children"):
        return thing, "forward"
    parent, _, method = path.rpartition(".")
    return operator.attrgetter(parent)(diffusion_model), method


def head_sizes(module):
    """(heads, head_dim) of an attention module or block, whatever ComfyUI's class calls them."""
    heads = next(getattr(module, name) for name in ("num_heads", "heads", "n_heads") if hasattr(module, name))
    for name in ("head_dim", "dim_head"):
        if hasattr(module, name):
            return heads, getattr(module, name)
    width = module.hidden_size if hasattr(module, "hidden_size") else module.hidden_dim
    return heads, width // heads


def patch_size(diffusion_model):
    """(t, h, w) latent cells per token."""
    if hasattr(diffusion_model, "patch_spatial"):
        return (diffusion_model.patch_temporal, diffusion_model.patch_spatial, diffusion_model.patch_spatial)
    size = getattr(diffusion_model, "patch_size", 1)
    if isinstance(size, int):
        return (getattr(diffusion_model, "patch_size_t", None) or 1, size, size)
    return (1,) * (3 - len(size)) + tuple(size)


def unsupported_model_reason(diffusion_model, view=as_it_is):
    """None, or one sentence why no call of this model can run sparse. view: of a MODEL, see view_of."""
    if model_facts(diffusion_model, view) is not None:
        return None
    name = class_name(diffusion_model, "", view)
    if any(row.model_class == name for row in LAYOUTS):
        return f"the self-attention inside this {name.rpartition('.')[2]} is not the one that SLA2 knows: another node changed it"
    return UNREACHABLE.get(name, f"model family {name.rpartition('.')[2]} is not supported yet")
