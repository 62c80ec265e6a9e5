"""LTX-2.3 and LTX-2.5: an image to a video with sound, 8 steps at half the size and 3 at full size."""

from .nodes import (
    SEED,
    Node,
    Wire,
    diffusion_model,
    file,
    image,
    loader,
    lora,
    note,
    report,
    sla2,
    text_encoder,
    vae,
    video,
)

CHECKPOINT = file("ltx-2.3-22b-dev-fp8.safetensors", "Lightricks/LTX-2.3-fp8", "checkpoints", folder="")
GEMMA_3 = file(
    "gemma_3_12B_it_fp4_mixed.safetensors", "Comfy-Org/ltx-2", "text_encoders", folder="split_files/text_encoders"
)
DISTILLED = file(
    "ltx_2.3_22b_distilled_1.1_lora_dynamic_fro09_avg_rank_111_bf16.safetensors",
    "Comfy-Org/ltx-2.3",
    "loras",
    folder="split_files/loras",
)
UPSCALER_23 = file(
    "ltx-2.3-spatial-upscaler-x2-1.1.safetensors", "Lightricks/LTX-2.3", "latent_upscale_models", folder=""
)
REPOSITORY = "Lightricks/LTX-2.5"
TRANSFORMER = file("ltx-2.5-22b-distilled-transformer-comfy-int8-convrot.safetensors", REPOSITORY, "diffusion_models")
GEMMA_4 = file("gemma4-12b-with-proj-ltx-2.5-comfy-int8-convrot.safetensors", REPOSITORY, "text_encoders")
VIDEO_VAE = file("ltx-2.5-video-vae-bf16.safetensors", REPOSITORY, "vae")
SOUND_VAE = file("ltx-2.5-audio-vae-bf16.safetensors", REPOSITORY, "vae")
UPSCALER_25 = file("ltx-2.5-latent-spatial-upscaler-x2-bf16-1.0.safetensors", REPOSITORY, "latent_upscale_models")

PROMPT = "The scene opens on the image. The camera pushes in slowly, natural motion, soft wind, quiet steps."
NEGATIVE = "cartoon, video game, still image, distorted, low quality"
HALF_SIGMAS = "1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0"
FULL_SIGMAS = "0.85, 0.7250, 0.4219, 0.0"
FRAMES, FPS = 121, 24
ABOUT = (
    "8 steps at 640 x 352, then the latent is doubled and 3 steps run at 1280 x 704. The first stage has 3,520 tokens and runs dense; "
    "the second has 14,080. One SLA2 Apply Attention serves both."
)


def samples(stage, guider, sampler, sigmas, latent, seed):
    """Nodes of one of the two stages."""
    wires = {name: Wire(f"{name}_{stage}") for name in ("noise", "guider", "sampler", "sigmas")}
    title = f"({'half' if stage == 'half' else 'full'} size)"
    return [
        Node(
            f"noise_{stage}",
            "RandomNoise",
            f"RandomNoise {title}",
            {"noise_seed": seed, "control_after_generate": "fixed"},
        ),
        Node(f"guider_{stage}", guider[0], f"{guider[0]} {title}", guider[1]),
        Node(f"sampler_{stage}", "KSamplerSelect", f"KSamplerSelect {title}", {"sampler_name": sampler}),
        Node(f"sigmas_{stage}", "ManualSigmas", f"Sigmas {title}", {"sigmas": sigmas}),
        Node(f"samples_{stage}", "SamplerCustomAdvanced", f"Sampler {title}", wires | {"latent_image": Wire(latent)}),
    ]


def recipe(name, loaders, model, kind, guiding, sampler, vae_wire, sound, upscaler):
    """guiding: a guider's inputs beside model and conditioning. vae_wire, sound: Wires of the two VAEs."""

    def guider(conditioning):
        wires = {"model": Wire("switch"), "positive": Wire(conditioning), "negative": Wire(conditioning, 1)}
        return kind, wires | guiding

    def first_frame(stage, latent, strength):
        inputs = {
            "vae": vae_wire,
            "image": Wire("prepared"),
            "latent": Wire(latent),
            "strength": strength,
            "bypass": False,
        }
        return Node(f"begun_{stage}", "LTXVImgToVideoInplace", f"First frame ({stage} size)", inputs)

    def with_sound(stage, sound_latent):
        inputs = {"video_latent": Wire(f"begun_{stage}"), "audio_latent": sound_latent}
        return Node(f"latent_{stage}", "LTXVConcatAVLatent", f"Video and sound ({stage} size)", inputs)

    return [
        [note(f"{name}: image to video", ABOUT), *loaders],
        [
            image(title="First frame"),
            Node("prepared", "LTXVPreprocess", None, {"image": Wire("image"), "img_compression": 18}),
            Node("positive", "CLIPTextEncode", "Prompt", {"clip": Wire("clip"), "text": PROMPT}, width=420),
            Node("negative", "CLIPTextEncode", "Negative prompt", {"clip": Wire("clip"), "text": NEGATIVE}, width=420),
            Node(
                "conditioning", "LTXVConditioning", None,
                {"positive": Wire("positive"), "negative": Wire("negative"), "frame_rate": FPS},
            ),
        ],
        sla2(model),
        [
            Node(
                "empty", "EmptyLTXVLatentVideo", "Half size", {"width": 640, "height": 352, "length": FRAMES, "batch_size": 1}
            ),
            Node(
                "empty_sound", "LTXVEmptyLatentAudio", None,
                {"audio_vae": sound, "frames_number": FRAMES, "frame_rate": FPS, "batch_size": 1},
            ),
            first_frame("half", "empty", 0.7),
            with_sound("half", Wire("empty_sound")),
            *samples("half", guider("conditioning"), sampler, HALF_SIGMAS, "latent_half", SEED),
        ],
        [
            Node("parts", "LTXVSeparateAVLatent", None, {"av_latent": Wire("samples_half")}),
            upscaler,
            Node(
                "larger", "LTXVLatentUpsampler", None,
                {"samples": Wire("parts"), "upscale_model": Wire("upscaler"), "vae": vae_wire},
            ),
            first_frame("full", "larger", 1.0),
            with_sound("full", Wire("parts", 1)),
            *samples("full", guider("conditioning"), sampler, FULL_SIGMAS, "latent_full", 42),
        ],
        [
            report("switch", "samples_full", title="SLA2 Report (full size)"),
            Node("done", "LTXVSeparateAVLatent", None, {"av_latent": Wire("samples_full")}),
            Node(
                "frames", "VAEDecodeTiled", None,
                {"samples": Wire("done"), "vae": vae_wire, "tile_size": 512, "overlap": 64, "temporal_size": 64, "temporal_overlap": 16},
            ),
            Node("sound", "LTXVAudioVAEDecode", None, {"samples": Wire("done", 1), "audio_vae": sound}),
        ],
        video(name.lower().replace("-", "_").replace(".", "_"), "frames", "sound", FPS),
    ]  # fmt: skip


def upscale_model(model):
    return loader("upscaler", "LatentUpscaleModelLoader", [model], model_name=model["name"])


LTX_2 = {
    "LTX-2.5 image to video": recipe(
        "LTX-2.5",
        [
            diffusion_model(TRANSFORMER), text_encoder(GEMMA_4, "ltxv"), vae(VIDEO_VAE, title="Load VAE (video)"),
            vae(SOUND_VAE, "sound_vae", "Load VAE (sound)"),
        ],
        "model", "LTXVDualCFGGuider", {"video_cfg": 1.0, "audio_cfg": 1.0}, "euler_ancestral", Wire("vae"), Wire("sound_vae"),
        upscale_model(UPSCALER_25),
    ),
    "LTX-2.3 image to video": recipe(
        "LTX-2.3",
        [
            loader("checkpoint", "CheckpointLoaderSimple", [CHECKPOINT], ckpt_name=CHECKPOINT["name"]),
            lora(DISTILLED, "checkpoint", title="Distilled LoRA", strength=0.5),
            loader(
                "clip", "LTXAVTextEncoderLoader", [GEMMA_3, CHECKPOINT], text_encoder=GEMMA_3["name"],
                ckpt_name=CHECKPOINT["name"], device="default",
            ),
            loader("sound_vae", "LTXVAudioVAELoader", [CHECKPOINT], ckpt_name=CHECKPOINT["name"]),
        ],
        "lora", "CFGGuider", {"cfg": 1.0}, "euler", Wire("checkpoint", 2), Wire("sound_vae"),
        upscale_model(UPSCALER_23),
    ),
}  # fmt: skip
