"""ComfyUI's own model classes at miniature size: random weights, and the inputs of one model call.

A latent of 4 x 16 x 20 cells makes 4 x 8 x 10 = 320 video tokens where a token is 1 x 2 x 2 cells.
"""

import importlib
import inspect

import torch

WAN = {
    "dim": 256,
    "ffn_dim": 256,
    "num_heads": 2,
    "num_layers": 2,
    "freq_dim": 32,
    "text_dim": 32,
}
HUNYUAN = {
    "in_channels": 16, "out_channels": 16, "vec_in_dim": 32, "context_in_dim": 48, "hidden_size": 256, "mlp_ratio": 1.0,
    "num_heads": 2, "depth": 1, "depth_single_blocks": 2, "axes_dim": [16, 56, 56], "theta": 256, "patch_size": [1, 2, 2],
    "qkv_bias": True, "guidance_embed": False, "byt5": False, "meanflow": False, "use_cond_type_embedding": False,
    "vision_in_dim": None, "meanflow_sum": False,
}  # fmt: skip
COSMOS = {
    "max_img_h": 64, "max_img_w": 64, "max_frames": 16, "in_channels": 16, "out_channels": 16, "patch_spatial": 2,
    "patch_temporal": 1, "model_channels": 256, "num_blocks": 2, "num_heads": 2, "mlp_ratio": 1.0,
    "crossattn_emb_channels": 32, "pos_emb_cls": "rope3d", "use_adaln_lora": True, "adaln_lora_dim": 16,
}  # fmt: skip
FLUX = {
    "in_channels": 16, "out_channels": 16, "vec_in_dim": 32, "context_in_dim": 48, "hidden_size": 256, "mlp_ratio": 1.0,
    "num_heads": 2, "depth": 1, "depth_single_blocks": 2, "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2,
    "qkv_bias": True, "guidance_embed": False,
}  # fmt: skip
LTX = {
    "in_channels": 128,
    "cross_attention_dim": 128,
    "attention_head_dim": 64,
    "num_attention_heads": 2,
    "caption_channels": 64,
    "num_layers": 2,
}
AUDIO = {
    "audio_in_channels": 128,
    "audio_cross_attention_dim": 64,
    "audio_attention_head_dim": 32,
    "audio_num_attention_heads": 2,
    # of the connectors that make the text: no part of the model's call, and the default is 600 million weights
    "connector_num_attention_heads": 1,
}
H3 = {
    "hidden_size": 256,
    "num_layers": 2,
    "token_refiner_num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 128,
    "ffn_hidden_size": 128,
    "text_dim": 64,
    "timestep_input_dim": 32,
    "time_embed_hidden_size": 64,
    "time_embed_dim": 32,
}


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wan_inputs(channels=16, frames=4, **more):
    return {
        "x": rand(1, channels, frames, 16, 20),
        "timestep": torch.tensor([500.0]),
        "context": rand(1, 24, 32),
    } | more


def reference(channels, frames=1, **size):
    return rand(1, channels, frames, size.get("height", 16), size.get("width", 20), seed=3)


def wan(path, inputs, **changes):
    return f"comfy.ldm.wan.{path}", WAN | changes, inputs


def video_inputs(name="timestep", channels=16, text=32, **more):
    return {"x": rand(1, channels, 4, 16, 20), name: torch.tensor([500.0]), "context": rand(1, 24, text)} | more


def ltx_inputs(guide_frames=0):
    inputs = {
        "x": rand(1, 128, 4 + guide_frames, 8, 10),
        "timestep": torch.tensor([0.5]),
        "context": rand(1, 24, 64),
        "attention_mask": None,
        "frame_rate": 25,
    }
    if guide_frames:
        mask = torch.ones(1, 1, 4 + guide_frames, 8, 10)
        mask[:, :, 4:, :, 5:] = -1  # guide tokens that the model drops
        inputs |= {
            "timestep": torch.full((1, 80 * (4 + guide_frames), 1), 0.5),
            "denoise_mask": mask,
            "keyframe_idxs": torch.rand(1, 3, guide_frames * 80, 2),
        }
    return inputs


def audio_video(inputs):
    return inputs | {"x": [inputs["x"], rand(1, 8, 12, 16, seed=2)], "context": rand(1, 24, 64 + 64)}


def h3_references(sizes):
    """What MiniMax H3's nodes hand over with reference images and videos of (frames, height, width) cells."""
    refs = [
        {"kind": "image" if t == 1 else "video", "latent_t": t, "latent_h": h, "latent_w": w, "ref_audio_t": 0,
         "latent": rand(1, 24, t, h, w, seed=number)}
        for number, (t, h, w) in enumerate(sizes)
    ]  # fmt: skip
    return {"refs": refs, "cond_video_latents": [ref["latent"] for ref in refs]}


# name: (class, its arguments, inputs of one call, how many video self-attention calls run sparse, how many others there are)
FAMILIES = {
    "wan t2v": (*wan("model.WanModel", wan_inputs()), 2, 2),
    "wan i2v": (*wan("model.WanModel", wan_inputs(36, clip_fea=rand(1, 257, 1280)), model_type="i2v", in_dim=36), 2, 4),
    "wan fun reference": (
        *wan("model.WanModel", wan_inputs(reference_latent=reference(16)[:, :, 0]), in_dim_ref_conv=16), 2, 2,
    ),
    "wan bernini": (*wan("model.WanModel", wan_inputs(context_latents=[reference(16), reference(16, height=8)])), 2, 2),
    "wan phantom": (*wan("model.WanModel", wan_inputs(time_dim_concat=reference(16, 2))), 2, 2),
    "wan vace": (
        *wan(
            "model.VaceWanModel", wan_inputs(vace_context=rand(1, 1, 96, 4, 16, 20), vace_strength=[1.0]),
            vace_layers=1, vace_in_dim=96,
        ), 3, 3,
    ),
    "wan camera": (
        *wan("model.CameraWanModel", wan_inputs(36, clip_fea=rand(1, 257, 1280)), in_dim=36), 2, 4,
    ),
    "wan s2v": (
        *wan("model.WanModel_S2V", wan_inputs(reference_latent=reference(16)), audio_inject_layers=[0], audio_dim=64), 2, 2,
    ),
    "wan humo": (*wan("model.HumoWanModel", wan_inputs(36, reference_latent=reference(36)), in_dim=36), 2, 2),
    "wan scail": (
        *wan(
            "model.SCAILWanModel",
            wan_inputs(20, reference_latent=reference(20), pose_latents=reference(20, 4, height=8, width=10)),
        ), 2, 4,
    ),
    "wan scail-2": (
        *wan(
            "model.SCAIL2WanModel",
            wan_inputs(20, reference_latent=reference(20, 2), pose_latents=reference(20, 4, height=8, width=10)),
        ), 2, 4,
    ),
    "wan animate": (
        *wan("model_animate.AnimateWanModel", wan_inputs(36, clip_fea=rand(1, 257, 1280)), in_dim=36, num_layers=5), 5, 10,
    ),
    # a call per frame after the reference's; others: those of the reference's queries, the pose branch, two cross-attentions
    "wan animate-2": (
        *wan(
            "model_animate2.WanAnimate2Model",
            wan_inputs(36, 5, clip_fea=rand(1, 257, 1280), pose_latents=reference(16, 4)), in_dim=36,
        ), 8, 10,
    ),
    "wan animate-2 without pose": (
        *wan("model_animate2.WanAnimate2Model", wan_inputs(36, 5, clip_fea=rand(1, 257, 1280)), in_dim=36), 2, 4,
    ),
    "wan dancer": (
        *wan(
            "model_wandancer.WanDancerModel", wan_inputs(36, clip_fea=rand(1, 257, 1280)), in_dim=36,
            audio_inject_layers=[0],
        ), 2, 4,
    ),
    "wan causal": (*wan("ar_model.CausalWanModel", wan_inputs()), 2, 2),
    "hunyuan-video": (
        "comfy.ldm.hunyuan_video.model.HunyuanVideo", HUNYUAN, video_inputs(text=48, y=rand(1, 32)), 3, 2,
    ),
    "hunyuan-video reference": (
        "comfy.ldm.hunyuan_video.model.HunyuanVideo", HUNYUAN,
        video_inputs(text=48, y=rand(1, 32), ref_latent=reference(16)), 3, 2,
    ),
    "hunyuan-video text mask": (
        "comfy.ldm.hunyuan_video.model.HunyuanVideo", HUNYUAN,
        video_inputs(text=48, y=rand(1, 32), attention_mask=torch.tensor([[1] * 15 + [0] * 9])), 3, 2,
    ),
    "hunyuan-video 1.5": (
        "comfy.ldm.hunyuan_video.model.HunyuanVideo",
        HUNYUAN | {
            "in_channels": 65, "out_channels": 32, "vec_in_dim": None, "patch_size": [1, 1, 1], "byt5": True,
            "use_cond_type_embedding": True, "vision_in_dim": 64, "axes_dim": [16, 56, 56],
        },
        {
            "x": rand(1, 65, 4, 8, 10), "timestep": torch.tensor([500.0]), "context": rand(1, 24, 48),
            "txt_byt5": rand(1, 9, 1472), "clip_fea": rand(1, 7, 64),
        }, 3, 2,
    ),
    "cogvideox": (
        "comfy.ldm.cogvideo.model.CogVideoXTransformer3DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 64, "time_embed_dim": 32, "text_embed_dim": 32, "num_layers": 2,
            "max_text_seq_length": 24, "use_rotary_positional_embeddings": True,
        }, video_inputs(), 2, 0,
    ),
    "ltx-video": ("comfy.ldm.lightricks.model.LTXVModel", LTX, ltx_inputs(), 2, 2),
    "ltx-video 13b": ("comfy.ldm.lightricks.model.LTXVModel", LTX | {"attention_head_dim": 128, "cross_attention_dim": 256}, ltx_inputs(), 2, 2),
    "ltx-video guides": ("comfy.ldm.lightricks.model.LTXVModel", LTX, ltx_inputs(2), 2, 2),
    # others of a block: text for video and sound, sound's own, and both ways between them
    "ltx-2": ("comfy.ldm.lightricks.av_model.LTXAVModel", LTX | AUDIO, audio_video(ltx_inputs()), 2, 10),
    "mochi": (
        "comfy.ldm.genmo.joint_model.asymm_models_joint.AsymmDiTJoint",
        {
            "in_channels": 12, "hidden_size_x": 1536, "hidden_size_y": 64, "depth": 1, "num_heads": 12, "mlp_ratio_x": 8.0,
            "mlp_ratio_y": 1.0, "use_t5": True, "t5_feat_dim": 32, "t5_token_length": 24, "learn_sigma": False,
            "qk_norm": True, "rope_theta": 10000.0, "qkv_bias": False, "out_bias": True, "patch_embed_bias": True,
        },
        {
            "x": rand(1, 12, 4, 16, 20), "timestep": torch.tensor([0.5]), "context": rand(1, 24, 32),
            "attention_mask": torch.ones(1, 24, dtype=torch.bool), "num_tokens": 17,
        }, 1, 0,
    ),
    "cosmos": ("comfy.ldm.cosmos.model.GeneralDIT", COSMOS | {"block_x_format": "THWBD", "extra_per_block_abs_pos_emb": True, "extra_per_block_abs_pos_emb_type": "learnable"}, video_inputs("timesteps"), 2, 2),
    "cosmos-predict2": ("comfy.ldm.cosmos.predict2.MiniTrainDIT", COSMOS, video_inputs("timesteps"), 2, 2),
    "kandinsky5": (
        "comfy.ldm.kandinsky5.model.Kandinsky5",
        {
            "in_text_dim": 32, "in_text_dim2": 24, "time_dim": 32, "model_dim": 128, "ff_dim": 128, "visual_embed_dim": 64,
            "num_text_blocks": 1, "num_visual_blocks": 2,
        }, video_inputs(y=rand(1, 24)), 2, 3,
    ),
    "minimax-h3": (
        "comfy.ldm.minimax.model.MiniMaxH3Model", H3,
        {
            "x": [rand(1, 24, 4, 16, 20), rand(1, 32, 2, 9, seed=2)], "timestep": torch.tensor([500.0]),
            "context": rand(1, 24, 256),
        }, 2, 0,
    ),
    "minimax-h3 references": (
        "comfy.ldm.minimax.model.MiniMaxH3Model", H3,
        {
            "x": [rand(1, 24, 4, 16, 20), rand(1, 32, 2, 9, seed=2)], "timestep": torch.tensor([500.0]),
            "context": rand(1, 24, 256), "minimax_payload": h3_references(((1, 16, 20), (1, 24, 32), (2, 16, 20))),
        }, 2, 0,
    ),
    "flux": (
        "comfy.ldm.flux.model.Flux", FLUX,
        {
            "x": rand(1, 16, 32, 40), "timestep": torch.tensor([0.5]), "context": rand(1, 24, 48), "y": rand(1, 32),
            "ref_latents": [rand(1, 16, 16, 20, seed=4)],
        }, 3, 0,
    ),
    "qwen-image": (
        "comfy.ldm.qwen_image.model.QwenImageTransformer2DModel",
        {"num_layers": 2, "num_attention_heads": 2, "joint_attention_dim": 48, "pooled_projection_dim": 32},
        {
            "x": rand(1, 16, 1, 32, 40), "timestep": torch.tensor([0.5]), "context": rand(1, 24, 48),
            "ref_latents": [rand(1, 16, 1, 16, 20, seed=4)],
        }, 2, 0,
    ),
}  # fmt: skip


# families whose allocations newer ComfyUI records, per model call and per block: where their blocks are
RECORDED = {"minimax-h3": "blocks", "minimax-h3 references": "blocks", "ltx-2": "transformer_blocks"}


def class_of(path):
    """The class, or None in a ComfyUI that does not have it."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError):
        return None


def inputs_for(cls, inputs):
    """The inputs as this version of the class takes them."""
    if "keyframe_idxs" in inputs and "denoise_mask" not in inspect.signature(cls._forward).parameters:
        return inputs | {"keyframe_idxs": inputs["keyframe_idxs"][..., 0]}
    payload = inputs.get("minimax_payload")
    if payload is not None:  # ComfyUI lays the sequence out once per sampling
        (_, _, *video), sound = inputs["x"][0].shape, inputs["x"][1].shape[-1]
        layout = cls.__init__.__globals__["PackedLayout"](
            inputs["context"].shape[1], *video, sound, refs=payload["refs"]
        )
        return inputs | {"minimax_payload": payload | {"layout": layout}}
    return inputs


def build(cls, arguments, operations):
    """A model of ``cls`` with small random weights; arguments that this version does not know are an error of the test."""
    if cls.__name__ == "Flux" and "txt_ids_dims" in cls.__init__.__globals__["FluxParams"].__annotations__:
        arguments = arguments | {"txt_ids_dims": []}
    known = arguments
    if cls.__name__ == "HunyuanVideo":
        names = cls.__init__.__globals__["HunyuanVideoParams"].__annotations__
        known = {name: value for name, value in arguments.items() if name in names}
    return fill(cls(**known, device="cpu", dtype=torch.float32, operations=operations))


def fill(model):
    """``model`` with small random weights, to be called without gradients."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point() or name.endswith(("seq", "freqs")) or 0 in tensor.stride():
            continue  # the last two are made by the constructor, not loaded
        if tensor.dim() > 1:
            scale = tensor[0].numel() ** -0.5
        elif ("norm" in name and name.endswith("weight")) or name.endswith("std-of-means"):
            tensor.data.fill_(1.0)
            continue
        else:
            scale = 0.1
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    return model.eval().requires_grad_(False)
