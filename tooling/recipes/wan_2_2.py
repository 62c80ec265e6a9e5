"""Wan 2.2 14B: an image to a video, two steps of each of its two models."""

from .nodes import SEED, Node, Wire, diffusion_model, file, image, lora, note, report, sla2, text_encoder, vae, video

REPOSITORY, OLDER = "Comfy-Org/Wan_2.2_ComfyUI_Repackaged", "Comfy-Org/Wan_2.1_ComfyUI_repackaged"
PARTS = "split_files"
UMT5 = file("umt5_xxl_fp8_e4m3fn_scaled.safetensors", OLDER, "text_encoders", folder=f"{PARTS}/text_encoders")
WAN_VAE = file("wan_2.1_vae.safetensors", REPOSITORY, "vae", folder=f"{PARTS}/vae")
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，"
    "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
STEPS, HALF = 4, 2


def of_noise(noise):
    """Loader, LoRA, shift and SLA2 of one of the two models."""
    name = f"wan2.2_i2v_{noise}_noise_14B_fp8_scaled.safetensors"
    steps = f"wan2.2_i2v_lightx2v_4steps_lora_v1_{noise}_noise.safetensors"
    model = file(name, REPOSITORY, "diffusion_models", folder=f"{PARTS}/diffusion_models")
    return (
        [
            diffusion_model(model, f"model_{noise}", f"Load Diffusion Model ({noise} noise)"),
            lora(
                file(steps, REPOSITORY, "loras", folder=f"{PARTS}/loras"), f"model_{noise}", f"lora_{noise}",
                f"4-step LoRA ({noise} noise)",
            ),
        ],
        [
            Node(
                f"shift_{noise}", "ModelSamplingSD3", f"Shift ({noise} noise)", {"model": Wire(f"lora_{noise}"), "shift": 5.0},
                width=400,
            ),
            *sla2(f"shift_{noise}", f"_{noise}", f"{noise} noise", Wire("on")),
        ],
    )  # fmt: skip


def sampler(noise, latent, **steps):
    inputs = {
        "model": Wire(f"switch_{noise}"), "positive": Wire("conditioning"), "negative": Wire("conditioning", 1),
        "latent_image": latent, "noise_seed": SEED, "control_after_generate": "fixed", "steps": STEPS, "cfg": 1.0,
        "sampler_name": "euler", "scheduler": "simple",
    }  # fmt: skip
    return Node(f"samples_{noise}", "KSamplerAdvanced", f"KSampler ({noise} noise)", inputs | steps)


HIGH, LOW = of_noise("high"), of_noise("low")
WAN_2_2 = {
    "Wan 2.2 image to video": [
        [
            note(
                "Wan 2.2: image to video",
                "Two models share the four steps: the one for high noise takes the first two, which decide the motion, the other the rest. "
                "Each has an SLA2 Apply Attention of its own; *SLA2 on* switches both.",
                "832 x 480, 81 frames make 32,760 tokens; below 8,192 everything runs dense.",
            ),
            *HIGH[0],
            *LOW[0],
            text_encoder(UMT5, "wan"),
            vae(WAN_VAE),
        ],
        [
            image(title="First frame"),
            Node("positive", "CLIPTextEncode", "Prompt", {"clip": Wire("clip"), "text": "the camera moves slowly forward, natural motion"}, width=420),
            Node("negative", "CLIPTextEncode", "Negative prompt", {"clip": Wire("clip"), "text": NEGATIVE}, width=420),
            Node(
                "conditioning", "WanImageToVideo", None,
                {
                    "positive": Wire("positive"), "negative": Wire("negative"), "vae": Wire("vae"), "start_image": Wire("image"),
                    "width": 832, "height": 480, "length": 81, "batch_size": 1,
                },
            ),
            Node("on", "PrimitiveBoolean", "SLA2 on", {"value": True}),
        ],
        HIGH[1],
        LOW[1],
        [
            sampler(
                "high", Wire("conditioning", 2), add_noise="enable", start_at_step=0, end_at_step=HALF,
                return_with_leftover_noise="enable",
            ),
            sampler(
                "low", Wire("samples_high"), add_noise="disable", start_at_step=HALF, end_at_step=10_000,
                return_with_leftover_noise="disable",
            ),
        ],
        [
            report("switch_high", "samples_high", "report_high", "SLA2 Report (high noise)"),
            report("switch_low", "samples_low", "report_low", "SLA2 Report (low noise)"),
            Node("frames", "VAEDecode", None, {"samples": Wire("samples_low"), "vae": Wire("vae")}),
        ],
        video("wan2_2", "frames", fps=16),
    ],
}  # fmt: skip
