"""Runs inside a process of its own, with ComfyUI on the path: compares the miniature with ComfyUI's Wan classes and
loaders, and prints one line of JSON with what it found. Started by test_comfyui.py:

    python comfy_probe.py COMFYUI REPOSITORY WEIGHTS_FOLDER
"""

import json
import sys

comfyui, repository, weights = sys.argv[1:4]
sys.argv = sys.argv[:1]
sys.path[:0] = [comfyui, repository]

from comfy.cli_args import args

args.cpu = True

import comfy.ops
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import torch
from comfy.latent_formats import Wan21
from comfy.ldm.wan.model import WanModel as ComfyWan
from comfy.ldm.wan.vae import WanVAE as ComfyVAE

from miniature import captions, lora, sample, scaled, vae, videos, wan

torch.set_grad_enabled(False)
torch.manual_seed(0)


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float("inf") if a.shape != b.shape else (a - b).abs().max().item()


def perturbed(module, amount: float):
    for p in module.parameters():
        p.add_(torch.randn_like(p) * amount)
    return module.eval()


def vae_gaps() -> dict:
    ours = perturbed(vae.WanVAE(8), 0.05)
    theirs = ComfyVAE(8, 16, [1, 2, 4, 4], 2, [], [False, True, True])
    theirs.load_state_dict(ours.state_dict(), strict=True)
    out = {"vae_keys_equal": set(ours.state_dict()) == set(theirs.state_dict())}
    for frames in (1, 5, 17):
        video = torch.rand(1, 3, frames, 32, 48) * 2 - 1
        out[f"encode_{frames}"] = gap(ours.encode(video), theirs.encode(video))
        latents = torch.randn(1, 16, (frames + 3) // 4, 4, 6)
        out[f"decode_{frames}"] = gap(ours.decode(latents), theirs.decode(latents))
    return out


def dit_gaps() -> dict:
    ours = perturbed(wan.WanModel(wan.WanConfig(num_layers=2)), 0.02)
    theirs = ComfyWan(dim=256, ffn_dim=768, num_heads=2, num_layers=2, operations=comfy.ops.disable_weight_init)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x, t = torch.randn(2, 16, 3, 8, 10), torch.tensor([31.0, 870.0])
    context = torch.cat([captions.embed(str(caption)) for caption in captions.all_captions()[:2]])
    apart = {"rope_options": dict.fromkeys(("scale_x", "scale_y"), 480 / (8 * x.shape[3]))}
    return {
        "velocity": gap(ours(x, t, context, rope_scale=1.0), theirs(x, t, context)),
        "velocity_scaled": gap(ours(x, t, context), theirs(x, t, context, transformer_options=apart)),
        "scale_matters": gap(ours(x, t, context), ours(x, t, context, rope_scale=1.0)),
    }


def loaded_files() -> dict:
    from pathlib import Path

    our_dit, our_vae = sample.load_models(Path(weights))
    options = {"dtype": torch.float32}
    patcher = comfy.sd.load_diffusion_model(f"{weights}/wan_miniature_dit.safetensors", model_options=options)
    # 8 latent rows are 64 pixels
    patcher.set_model_rope_options(480 / 64, 0.0, 480 / 64, 0.0, 1.0, 0.0)
    their_vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(f"{weights}/wan_miniature_vae.safetensors"))
    their_vae.vae_dtype = torch.float32
    their_vae.first_stage_model.float()
    scene = scaled.simulate(captions.all_captions()[:1], frames=9, height=64, width=80, seed=3)
    video = videos.render(scene, frames=9, height=64, width=80)
    latents = our_vae.encode(video)
    pixels = (video[0].permute(1, 2, 3, 0) + 1) / 2
    decoded = their_vae.decode(latents)
    expected = (our_vae.decode(latents)[0].permute(1, 2, 3, 0).clamp(-1, 1) + 1) / 2

    context = captions.embed("two red balls bounce over tiles, camera still")
    shape, steps, cfg = (1, 16, 3, 8, 10), 4, 3.0
    ours = sample.sample_latents(our_dit, context, shape=shape, seed=5, steps=steps, cfg=cfg)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    theirs = comfy.sample.sample_custom(
        patcher, noise, cfg, comfy.samplers.sampler_object("euler"), sample.noise_schedule(steps),
        [[context, {}]], [[torch.zeros_like(context), {}]], torch.zeros(shape), disable_pbar=True,
    )  # fmt: skip
    config = patcher.model.model_config
    few = lora.add_lora(sample.load_models(Path(weights))[0], 8)
    for name, p in few.named_parameters():
        if name.endswith("lora_up"):
            p.add_(torch.randn_like(p))
    file = Path(weights) / "few_steps_lora.safetensors"
    lora.save_lora(file, lora.lora_of(few.state_dict()), torch.bfloat16, "a LoRA of 4 steps")
    merged = sample.load_models(Path(weights), lora=file)[0]
    distilled = sample.sample_latents(merged, context, shape=shape, seed=5, steps=steps, cfg=1.0)
    undistilled = sample.sample_latents(our_dit, context, shape=shape, seed=5, steps=steps, cfg=1.0)
    patched, _ = comfy.sd.load_lora_for_models(patcher, None, comfy.utils.load_torch_file(str(file)), 1.0, 0.0)
    file.unlink()
    with_lora = comfy.sample.sample_custom(
        patched, noise, 1.0, comfy.samplers.sampler_object("euler"), sample.noise_schedule(steps),
        [[context, {}]], [[torch.zeros_like(context), {}]], torch.zeros(shape), disable_pbar=True,
    )  # fmt: skip
    return {
        "lora_layers": len(patched.patches),
        "lora_sampled": gap(vae.denormalise_latents(distilled), with_lora),
        "lora_matters": gap(distilled, undistilled),
        "detected": type(config).__name__,
        "detected_sizes": {
            k: config.unet_config[k] for k in ("dim", "ffn_dim", "num_layers", "num_heads", "model_type")
        },
        "model_type": patcher.model.model_type.name,
        "default_shift": patcher.model.model_sampling.shift,
        "file_encode": gap(latents, their_vae.encode(pixels)),
        "file_decode": gap(decoded.reshape(expected.shape), expected),
        "sampled": gap(vae.denormalise_latents(ours), theirs),
    }


def latent_constants() -> dict:
    theirs = Wan21()
    return {
        "mean": gap(theirs.latents_mean.flatten(), torch.tensor(vae.LATENT_MEAN)),
        "std": gap(theirs.latents_std.flatten(), torch.tensor(vae.LATENT_STD)),
    }


print("PROBE " + json.dumps({"constants": latent_constants(), **vae_gaps(), **dit_gaps(), **loaded_files()}))
