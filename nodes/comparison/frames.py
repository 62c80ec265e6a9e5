"""Frames of the dense and the SLA2 video for the slider in the page."""

import torch
from comfy_api.latest import ui

MAX_FRAMES = 8  # two PNG files each


def check_vae(vae, latent_format):
    """Raises ValueError with one sentence where the VAE belongs to another model, before anything is sampled."""
    if vae.latent_channels != latent_format.latent_channels:
        raise ValueError(
            f"SLA2 Compare: the vae decodes {vae.latent_channels} latent channels and this model makes "
            f"{latent_format.latent_channels}: connect the model's own VAE, or none."
        )


def saved_frames(vae, latents, cls):
    """{"numbers": of the frames from 1, "dense": [file, ...], "sla2": [file, ...]} in ComfyUI's folder for temporary files.

    latents: dense and SLA2, (B, C, T, H, W) or (B, C, H, W). file: {"filename", "subfolder", "type"}.
    """
    files = {}
    for name, latent in zip(("dense", "sla2"), latents, strict=True):
        images = vae.decode(latent)
        images = images.reshape(-1, *images.shape[-3:])
        numbers = spread(images.shape[0])
        files[name] = ui.PreviewImage(images[numbers], cls=cls).as_dict()["images"]
    return {"numbers": [number + 1 for number in numbers], **files}


def spread(count):
    """At most MAX_FRAMES of 0 ... count - 1, evenly spread, both ends among them."""
    return torch.linspace(0, count - 1, min(count, MAX_FRAMES)).round().int().tolist()
