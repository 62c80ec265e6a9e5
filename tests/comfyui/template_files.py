"""Writes tiny files under the names of official templates, in their formats and with ComfyUI's own classes: random weights.

In a process of its own, with one ComfyUI on the path. Started by test_official_templates_run.py:

    python template_files.py COMFYUI MODELS
"""

import json
import sys
from pathlib import Path

comfyui, models = sys.argv[1:]
sys.argv = sys.argv[:1]
sys.path.insert(0, comfyui)

from comfy.cli_args import args

args.cpu = True

import comfy.ops
import safetensors.torch
import torch
from family_models import AUDIO, H3, LTX, WAN, build, class_of, fill

PLAIN = comfy.ops.disable_weight_init
HADAMARD = 256  # channels that "convrot" rotates together
MARK = "comfy_quant"

# "pruned" checkpoints keep the time embedding as a curve
H3_FILES = H3 | {"adaln_curve_grid": 17, "time_embed_dim": 8}
# sizes that ComfyUI does not read from a file
WAN_FILES = WAN | {"in_dim": 36, "text_dim": 4096, "freq_dim": 256}
LTX_TRANSFORMER = (
    LTX
    | AUDIO
    | {
        "attention_head_dim": 128,
        "cross_attention_dim": 256,
        "apply_gated_attention": True,
        "cross_attention_adaln": True,
        "caption_proj_before_connector": True,
        "caption_projection_first_linear": False,
        "caption_channels": 256,
        "connector_attention_head_dim": 128,
        "connector_num_attention_heads": 2,
        "connector_num_layers": 1,
        "audio_connector_attention_head_dim": 64,
        "audio_connector_num_attention_heads": 1,
        "connector_apply_gated_attention": True,
    }
)
WAN_VAE = {
    "dim": 8,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
}
HALVING = ["compress_all", {"multiplier": 1}]
LTX_VIDEO_VAE = {
    "dims": 3,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 128,
    "patch_size": 4,
    "norm_layer": "pixel_norm",
    "latent_log_var": "uniform",
    "encoder_base_channels": 16,
    "decoder_base_channels": 16,
    "encoder_blocks": [HALVING, HALVING, HALVING, ["res_x", {"num_layers": 1}]],
    "decoder_blocks": [HALVING, HALVING, HALVING, ["res_x", {"num_layers": 1}]],
}
LTX_AUDIO_VAE = {
    "model": {
        "params": {
            "sampling_rate": 16000,
            "ddconfig": {
                "double_z": True, "mel_bins": 64, "z_channels": 8, "resolution": 256, "downsample_time": False, "in_channels": 2,
                "out_ch": 2, "ch": 16, "ch_mult": [1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
                "mid_block_add_attention": False, "norm_type": "pixel", "causality_axis": "height",
            },
        }
    },
    "preprocessing": {"stft": {"filter_length": 1024, "hop_length": 160}},
}  # fmt: skip
LTX_VOCODER = {
    "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1, 3, 5]],
    "upsample_rates": [5, 4, 2, 2, 2],
    "upsample_kernel_sizes": [16, 16, 8, 4, 4],
    "upsample_initial_channel": 64,
    "stereo": True,
    "resblock": "1",
}
LTX_UPSCALER = {"in_channels": 128, "mid_channels": 32, "num_blocks_per_stage": 1, "dims": 3}


def weights_of(path, arguments):
    return build(class_of(path), arguments, PLAIN).state_dict()


def filled(path, *arguments, **named):
    """An instance of a class with small random weights."""
    return fill(class_of(path)(*arguments, **named))


def attention_and_mlp(state):
    """Names, without ".weight", of the linear layers inside the blocks: what quantised files quantise."""
    return [
        name.removesuffix(".weight")
        for name, tensor in state.items()
        if name.startswith(("blocks.", "transformer_blocks."))
        and name.endswith(".weight")
        and tensor.dim() == 2
        and "adaln" not in name
        and "gate" not in name
    ]


def note(**layer):
    return torch.tensor(list(json.dumps(layer).encode()), dtype=torch.uint8)


def int8_convrot(state):
    """8-bit integers of weights whose input channels are rotated in groups; layers that no group fits stay as they are."""
    state, tensors = dict(state), class_of("comfy.quant_ops.QuantizedTensor")
    for name in attention_and_mlp(state):
        if state[f"{name}.weight"].shape[1] % HADAMARD:
            continue
        options = {"per_channel": True, "convrot": True, "convrot_groupsize": HADAMARD}
        packed = tensors.from_float(state[f"{name}.weight"], "TensorWiseINT8Layout", **options)
        for suffix, tensor in packed.state_dict(f"{name}.weight").items():
            state[suffix] = tensor
        state[f"{name}.{MARK}"] = note(format="int8_tensorwise", convrot=True, convrot_groupsize=HADAMARD)
    return state


def fp8(state, scale_name):
    """float8_e4m3fn with one scale per weight; (state, names of the layers)."""
    state, names = dict(state), attention_and_mlp(state)
    for name in names:
        weight = state[f"{name}.weight"].float()
        scale = weight.abs().amax() / torch.finfo(torch.float8_e4m3fn).max
        state[f"{name}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
        state[f"{name}.{scale_name}"] = scale
    return state, names


def fp8_scaled(state):
    """The older way of ComfyUI's own repackaged files: one tensor says that all linear layers are scaled."""
    state, _ = fp8(state, "scale_weight")
    return state | {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}


def lora(state, rank=4):
    """A LoRA in bfloat16 on every layer that is quantised, small beside the weights."""
    generator, made = torch.Generator().manual_seed(3), {}
    for name in attention_and_mlp(state):
        outputs, inputs = state[f"{name}.weight"].shape
        down = torch.randn(rank, inputs, generator=generator) * inputs**-0.5
        made[f"diffusion_model.{name}.lora_A.weight"] = down.to(torch.bfloat16)
        up = torch.randn(outputs, rank, generator=generator) * 0.1
        made[f"diffusion_model.{name}.lora_B.weight"] = up.to(torch.bfloat16)
    return made


def halved(state):
    """What is not quantised is bfloat16 in these files."""
    return {
        name: tensor.to(torch.bfloat16) if tensor.dtype == torch.float32 and tensor.dim() > 1 else tensor
        for name, tensor in state.items()
    }


def save(folder, name, state, metadata=None):
    path = Path(models) / folder / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({key: tensor.contiguous() for key, tensor in state.items()}, path, metadata)


def prefixed(prefix, state):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def minimax_h3():
    state = weights_of("comfy.ldm.minimax.model.MiniMaxH3Model", H3_FILES)
    for name in ("fl2va", "ref2va"):
        save("diffusion_models", f"minimax_h3_{name}_pruned_int8_convrot", int8_convrot(halved(state)))
    save("loras", "minimax_h3_fl2v_turbo_8step_v1.0_comfyui_bf16", lora(state))
    save("loras", "minimax_h3_ref2v_turbo_4step_v0.1_comfyui_bf16", lora(state))
    # ComfyUI's class for the full decoder has 2.6 billion weights; it takes the tiny autoencoder's format from the same loader
    save("vae", "minimax_h3_video_vae_int8_convrot", filled("comfy.taesd.taehv.TAEHV", 24).half().state_dict())


def ltx_2():
    transformer = weights_of("comfy.ldm.lightricks.av_model.LTXAVModel", LTX_TRANSFORMER)
    video = filled("comfy.ldm.lightricks.vae.causal_video_autoencoder.VideoVAE", config=LTX_VIDEO_VAE).state_dict()
    config = {"transformer": LTX_TRANSFORMER, "vae": LTX_VIDEO_VAE, "audio_vae": LTX_AUDIO_VAE, "vocoder": LTX_VOCODER}
    metadata = {"config": json.dumps(config)}
    sound = filled("comfy.ldm.lightricks.vae.audio_vae.AudioVAE", metadata)
    sound = prefixed("audio_vae.", sound.autoencoder.state_dict()) | prefixed("vocoder.", sound.vocoder.state_dict())
    upscaler = halved(
        filled("comfy.ldm.lightricks.latent_upsampler.LatentUpsampler", PLAIN, **LTX_UPSCALER).state_dict()
    )
    of_upscaler = {"config": json.dumps(LTX_UPSCALER)}

    packed, names = fp8(halved(transformer), "weight_scale")
    layers = {f"model.diffusion_model.{name}": {"format": "float8_e4m3fn"} for name in names}
    quantised = metadata | {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    whole = prefixed("model.diffusion_model.", packed) | prefixed("vae.", video) | sound
    save("checkpoints", "ltx-2.3-22b-dev-fp8", whole, quantised)
    save("loras", "ltx_2.3_22b_distilled_1.1_lora_dynamic_fro09_avg_rank_111_bf16", lora(transformer))
    # the prompt's enhancer is off, but the server wants its file to be there
    save("loras", "gemma-3-12b-it-abliterated_lora_rank64_bf16", {"unused.lora_A.weight": torch.zeros(1, 1)})
    save("latent_upscale_models", "ltx-2.3-spatial-upscaler-x2-1.1", upscaler, of_upscaler)

    name = "ltx-2.5-22b-distilled-transformer-comfy-int8-convrot"
    save("diffusion_models", name, int8_convrot(halved(transformer)), metadata)
    save("vae", "ltx-2.5-video-vae-bf16", video, metadata)
    save("vae", "ltx-2.5-audio-vae-bf16", sound, metadata)
    save("latent_upscale_models", "ltx-2.5-latent-spatial-upscaler-x2-bf16-1.0", upscaler, of_upscaler)


def wan_2_2():
    state = weights_of("comfy.ldm.wan.model.WanModel", WAN_FILES)
    for noise in ("high", "low"):
        save("diffusion_models", f"wan2.2_i2v_{noise}_noise_14B_fp8_scaled", fp8_scaled(halved(state)))
        save("loras", f"wan2.2_i2v_lightx2v_4steps_lora_v1_{noise}_noise", lora(state))
    save("vae", "wan_2.1_vae", halved(filled("comfy.ldm.wan.vae.WanVAE", **WAN_VAE).state_dict()))


for write in (minimax_h3, ltx_2, wan_2_2):
    write()
