"""Frames of the dense and the SLA2 video for the slider in the page."""

import torch
from comfy_api.latest import ui

from .runs import parts_of

MAX_FRAMES = 8  # two PNG files each


def check_vae(vae, latent):
    """Raises ValueError with one sentence where the VAE is not for this latent's video, before anything is sampled."""
    channels = parts_of(latent)[0].shape[1]
    if vae.latent_channels != channels:
        raise ValueError(
            f"SLA2 Compare: the vae decodes {vae.latent_channels} latent channels and this model makes {channels}: "
            "connect the VAE of the model's video, or none."
        )


def saved_frames(vae, latents, cls):
    """{"numbers": of the frames from 1, "dense": [file, ...], "sla2": [file, ...]} in ComfyUI's folder for temporary files.

    latents: dense and SLA2, (B, C, T, H, W) or (B, C, H, W), or of several parts, of which the first is that. file: {"filename", "subfolder", "type"}.
    """
    files = {}
    for name, latent in zip(("dense", "sla2"), latents, strict=True):
        images = vae.decode(parts_of(latent)[0])
        images = images.reshape(-1, *images.shape[-3:])
        numbers = spread(images.shape[0])
        files[name] = ui.PreviewImage(images[numbers], cls=cls).as_dict()["images"]
    return {"numbers": [number + 1 for number in numbers], **files}


def spread(count):
    """At most MAX_FRAMES of 0 ... count - 1, evenly spread, both ends among them."""
    return torch.linspace(0, count - 1, min(count, MAX_FRAMES)).round().int().tolist()
