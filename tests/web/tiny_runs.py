"""Running workflows of large models on tiny files: what stands in for models whose size ComfyUI fixes, and pictures to load."""

import zlib

import torch
from PIL import Image

from tooling import graph

SOUND_VAE = "minimax_h3_audio_vae_fp32.safetensors"
ENOUGH = 512  # minimum_tokens: beside 8192 as small as these videos beside real ones


def stand_in(node):
    """A helper for a model whose size ComfyUI fixes, or the node itself; of an API prompt."""
    kind, inputs = node["class_type"], node["inputs"]
    if kind in ("CLIPLoader", "LTXAVTextEncoderLoader"):
        return {"class_type": "SLA2TestTextEncoder", "inputs": {"family": inputs.get("type", "ltxv")}}
    if inputs.get("vae_name") == SOUND_VAE:
        return {"class_type": "SLA2TestSoundVAE", "inputs": {}}
    return node


def make_images(folder, prompt):
    """A picture in ``folder`` under the name of each that a prompt loads."""
    for name in graph.of_class(prompt, "LoadImage"):
        path = folder / prompt[name]["inputs"]["image"]
        noise = torch.rand(6, 8, 3, generator=torch.Generator().manual_seed(zlib.crc32(path.name.encode())))
        Image.fromarray((noise * 255).byte().numpy()).resize((320, 240), Image.Resampling.BICUBIC).save(path)
