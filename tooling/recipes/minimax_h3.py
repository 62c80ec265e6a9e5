"""MiniMax H3: text, an image or references to a video with sound, with the turbo LoRAs of 4 and 8 steps."""

from .nodes import SEED, Node, Wire, diffusion_model, file, image, lora, note, report, sla2, text_encoder, vae, video

REPOSITORY = "Comfy-Org/MiniMax-H3"
FL2V = file("minimax_h3_fl2va_pruned_int8_convrot.safetensors", REPOSITORY, "diffusion_models")
REF2V = file("minimax_h3_ref2va_pruned_int8_convrot.safetensors", REPOSITORY, "diffusion_models")
QWEN = file("qwen3vl_32b_minimax_h3_nvfp4_awq.safetensors", REPOSITORY, "text_encoders")
VIDEO_VAE = file("minimax_h3_video_vae_int8_convrot.safetensors", REPOSITORY, "vae")
SOUND_VAE = file("minimax_h3_audio_vae_fp32.safetensors", REPOSITORY, "vae")
TURBO_8 = file(
    "minimax_h3_fl2v_turbo_8step_v1.0_comfyui_bf16.safetensors", "lightx2v/Minimax-h3-Turbo", "loras", folder=""
)
TURBO_4 = file("minimax_h3_ref2v_turbo_4step_v0.1_comfyui_bf16.safetensors", REPOSITORY, "loras")
SIZE = {"width": 1344, "height": 768, "length": 124}
ENOUGH = "1344 x 768, 124 frames at 24 a second make about 37,000 tokens; below 8,192 everything runs dense."


def recipe(name, about, model, turbo, steps, images, conditioning, *more):
    return [
        [
            note(f"MiniMax H3: {name}", about, ENOUGH, *more),
            diffusion_model(model),
            lora(turbo, title=f"Turbo LoRA, {steps} steps"),
            text_encoder(QWEN, "minimax"),
            vae(VIDEO_VAE, title="Load VAE (video)"),
            vae(SOUND_VAE, "sound_vae", "Load VAE (sound)"),
        ],
        [*images, conditioning],
        sla2("lora"),
        [
            Node("noise", "RandomNoise", None, {"noise_seed": SEED, "control_after_generate": "fixed"}),
            Node("guider", "BasicGuider", None, {"model": Wire("switch"), "conditioning": Wire("conditioning")}),
            Node("sampler", "KSamplerSelect", None, {"sampler_name": "res_multistep"}),
            Node(
                "sigmas", "BasicScheduler", None,
                {"model": Wire("switch"), "scheduler": "simple", "steps": steps, "denoise": 1.0},
            ),
            Node(
                "samples", "SamplerCustomAdvanced", None,
                {
                    "noise": Wire("noise"), "guider": Wire("guider"), "sampler": Wire("sampler"), "sigmas": Wire("sigmas"),
                    "latent_image": Wire("conditioning", 1),
                },
            ),
        ],
        [
            report("switch", "samples"),
            Node("frames", "VAEDecode", None, {"samples": Wire("samples"), "vae": Wire("vae")}),
            Node("sound", "VAEDecodeAudio", None, {"samples": Wire("samples"), "vae": Wire("sound_vae")}),
        ],
        video(f"h3_{name.split()[0]}", "frames", "sound"),
    ]  # fmt: skip


def first_frame(prompt, **images):
    inputs = {"clip": Wire("clip"), "vae": Wire("vae"), "prompt": prompt} | SIZE | images
    return Node("conditioning", "MiniMaxH3ImageToVideo", None, inputs, width=420)


MINIMAX_H3 = {
    "MiniMax H3 image to video": recipe(
        "image to video", "One image becomes the first frame; the sound is made with the video.", FL2V, TURBO_8, 8, [image(title="First frame")],
        first_frame("The scene opens exactly on image 1. The camera pushes in slowly; natural motion, soft wind.", first_frame=Wire("image")),
    ),
    "MiniMax H3 text to video": recipe(
        "text to video", "A text becomes a video with sound.", FL2V, TURBO_8, 8, [],
        first_frame("A fox runs through a snowy forest at dawn, the camera follows it close to the ground; snow crunches under its paws."),
    ),
    "MiniMax H3 references to video": recipe(
        "references to video",
        "Up to nine images stand as references: <Picture 1> and <Picture 2> in the prompt.",
        REF2V, TURBO_4, 4, [image("image_1", "Picture 1"), image("image_2", "Picture 2")],
        Node(
            "conditioning", "MiniMaxH3ReferenceToVideo", None,
            {
                "clip": Wire("clip"), "vae": Wire("vae"), "audio_vae": Wire("sound_vae"),
                "ref_images.ref_image_0": Wire("image_1"), "ref_images.ref_image_1": Wire("image_2"),
                "prompt": "<Picture 1> walks through the place of <Picture 2>, the camera moves alongside; natural motion.",
                "ref_image_size": "match",
            } | SIZE,
            width=420,
        ),
    ),
}  # fmt: skip
