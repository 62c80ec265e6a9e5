"""Random checkpoints of Wan 2.1's shape, small enough for a CPU: ComfyUI's own loaders take them."""

import safetensors.torch
import torch
from safetensors import safe_open

from sla2_kernels.weights import RouterLayer, RouterWeights

DIM, HEADS, LAYERS, FFN = 256, 2, 3, 512  # head_dim is always 128 in Wan
FREQUENCIES, TEXT_DIM, LATENT_CHANNELS = 256, 4096, 16


def wan_state_dict(in_dim=LATENT_CHANNELS, layers=LAYERS, image=False, vace=False, seed=0):
    """Random weights, N(0, 1 / fan_in), norms 1, biases 0, under the names of the original checkpoints.

    image: an image-to-video model (CLIP image embedding and a second cross-attention per block). vace: a VACE model with
    one control block.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {}

    def normal(name, *shape, fan_in=None):
        scale = (fan_in or shape[-1]) ** -0.5
        state[name] = torch.randn(*shape, generator=generator) * scale

    def linear(name, inputs, outputs):
        normal(f"{name}.weight", outputs, inputs)
        state[f"{name}.bias"] = torch.zeros(outputs)

    state["patch_embedding.weight"] = torch.randn(DIM, in_dim, 1, 2, 2, generator=generator) * (in_dim * 4) ** -0.5
    state["patch_embedding.bias"] = torch.zeros(DIM)
    linear("text_embedding.0", TEXT_DIM, DIM)
    linear("text_embedding.2", DIM, DIM)
    linear("time_embedding.0", FREQUENCIES, DIM)
    linear("time_embedding.2", DIM, DIM)
    linear("time_projection.1", DIM, 6 * DIM)
    for block in [f"blocks.{index}" for index in range(layers)] + ["vace_blocks.0"] * vace:
        normal(f"{block}.modulation", 1, 6, DIM)
        for attention in ("self_attn", "cross_attn"):
            names = ["q", "k", "v", "o"] + ["k_img", "v_img"] * (image and attention == "cross_attn")
            for name in names:
                linear(f"{block}.{attention}.{name}", DIM, DIM)
            for name in ["norm_q", "norm_k"] + ["norm_k_img"] * ("k_img" in names):
                state[f"{block}.{attention}.{name}.weight"] = torch.ones(DIM)
        state[f"{block}.norm3.weight"] = torch.ones(DIM)
        state[f"{block}.norm3.bias"] = torch.zeros(DIM)
        linear(f"{block}.ffn.0", DIM, FFN)
        linear(f"{block}.ffn.2", FFN, DIM)
    if vace:
        state["vace_patch_embedding.weight"] = torch.randn(DIM, 96, 1, 2, 2, generator=generator) * 384**-0.5
        state["vace_patch_embedding.bias"] = torch.zeros(DIM)
        linear("vace_blocks.0.before_proj", DIM, DIM)
        linear("vace_blocks.0.after_proj", DIM, DIM)
    if image:
        for name, width in (("0", 1280), ("4", DIM)):
            state[f"img_emb.proj.{name}.weight"] = torch.ones(width)
            state[f"img_emb.proj.{name}.bias"] = torch.zeros(width)
        linear("img_emb.proj.1", 1280, 1280)
        linear("img_emb.proj.3", 1280, DIM)
    normal("head.modulation", 1, 2, DIM)
    linear("head.head", DIM, LATENT_CHANNELS * 4)
    return state


def save_wan(path, **shape):
    """Writes a tiny Wan diffusion model in bfloat16."""
    state = {name: tensor.to(torch.bfloat16) for name, tensor in wan_state_dict(**shape).items()}
    safetensors.torch.save_file(state, path)


def save_router(path, layers=LAYERS, **changes):
    """Writes a router file for save_wan's model: random projections near the identity, ratios near 0.8."""
    generator = torch.Generator().manual_seed(1)
    head_dim = changes.pop("head_dim", 128)
    heads = changes.pop("num_heads", HEADS)
    rows = tuple(
        RouterLayer(
            proj_q=torch.eye(head_dim) + 0.05 * torch.randn(head_dim, head_dim, generator=generator),
            proj_k=torch.eye(head_dim) + 0.05 * torch.randn(head_dim, head_dim, generator=generator),
            alpha_logits=torch.full((2, heads, 1), 1.4),
        )
        for _ in range(layers)
    )
    facts = {"model_family": "wan", "sparsities": (0.75, 0.97), "precision": "int8"} | changes
    RouterWeights(rows, num_heads=heads, head_dim=head_dim, **facts).save(path)


def break_metadata(path, **changes):
    """Rewrites metadata entries of a safetensors file, leaving its tensors alone."""
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    safetensors.torch.save_file(tensors, path, metadata | changes)
