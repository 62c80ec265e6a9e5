"""In place of the nodes of official templates whose model cannot be tiny, because ComfyUI fixes its size; and a latent kept."""

import math
import zlib
from pathlib import Path

import folder_paths
import safetensors.torch
import torch

# widths of the conditioning that the tiny files of template_files.py take
WIDTHS = {"wan": 4096, "minimax": 64, "ltxv": 256 + 64}
PICTURE_CELL = 32  # pixels of a reference image beside one text token of MiniMax H3


class TextEncoder:
    """What the nodes ask of a CLIP: the same random states for the same text, a token per word, H3's tokens per picture."""

    def __init__(self, family):
        self.family = family

    def tokenize(self, text, images=(), minimax_ref_items=None, **_):
        pictures = [item["data"] for item in minimax_ref_items or () if item["type"] == "image"] or images
        cells = [math.ceil(side / PICTURE_CELL) for picture in pictures for side in picture.shape[1:3]]
        return {"text": text, "pictures": [a * b + 2 for a, b in zip(cells[::2], cells[1::2], strict=True)]}

    def encode_from_tokens_scheduled(self, tokens):
        in_pictures, words = sum(tokens["pictures"]), max(1, len(tokens["text"].split()))
        generator = torch.Generator().manual_seed(zlib.crc32(tokens["text"].encode()))
        states = torch.randn(1, in_pictures + words, WIDTHS[self.family], generator=generator) * 0.1
        extra = {"ltxv": {"unprocessed_ltxav_embeds": True}, "wan": {}, "minimax": {}}[self.family]
        if self.family == "minimax":
            extra["minimax_token_tags"] = torch.tensor([0] * in_pictures + [1] * words)
        return [[states, extra]]


class SLA2TestTextEncoder:
    RETURN_TYPES = ("CLIP",)
    FUNCTION = "load"
    CATEGORY = "sla2 tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"family": (list(WIDTHS),)}}

    def load(self, family):
        return (TextEncoder(family),)


class Silence:
    """Decodes a latent of H3's sound, (B, 32, 2, T) at 40 a second."""

    audio_sample_rate = 32000

    def decode(self, latent):
        return torch.zeros(latent.shape[0], latent.shape[-1] * self.audio_sample_rate // 40, 2)


class SLA2TestSoundVAE:
    RETURN_TYPES = ("VAE",)
    FUNCTION = "load"
    CATEGORY = "sla2 tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def load(self):
        return (Silence(),)


class SLA2TestKeepLatent:
    """Writes a latent to the output folder: SaveLatent takes none of a video together with its sound."""

    RETURN_TYPES = ()
    FUNCTION = "keep"
    OUTPUT_NODE = True
    CATEGORY = "sla2 tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"samples": ("LATENT",), "name": ("STRING", {})}}

    def keep(self, samples, name):
        latent = samples["samples"]
        parts = latent.unbind() if latent.is_nested else [latent]
        tensors = {str(index): part.contiguous() for index, part in enumerate(parts)}
        safetensors.torch.save_file(tensors, Path(folder_paths.get_output_directory()) / name)
        return ()


CLASSES = (SLA2TestTextEncoder, SLA2TestSoundVAE, SLA2TestKeepLatent)
