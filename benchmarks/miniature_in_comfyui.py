"""ComfyUI's own Wan class with the miniature's weights: loaded by ComfyUI's loader, sampled by its sampler, patched by this pack."""

import sys
from pathlib import Path

import torch

from miniature.captions import embed
from miniature.sample import SHIFT
from miniature.weight_files import weight_file

from .measure import is_gpu
from .wan_in_comfyui import import_comfyui, load_pack

ROUTER = weight_file("wan_miniature_router.safetensors")


class MiniatureInComfyUI:
    """comfyui: folder of a checkout. device: "cuda", "cuda:1" or "cpu". One per process: it imports ComfyUI."""

    def __init__(self, comfyui, device):
        sys.path.insert(0, str(Path(comfyui)))
        if is_gpu(device):
            # as ComfyUI's main.py does, before anything of comfy is imported
            import comfy_aimdo.control

            comfy_aimdo.control.init()
        import_comfyui(comfyui, device)
        self._pack = load_pack().__name__

    def load(self, device=None):
        """A new ModelPatcher that samples on ``device`` (torch.device), as ComfyUI's Select Model Device does; None: on its default.

        Its noise levels are shifted as the miniature's are, as ModelSamplingSD3 does it.
        """
        import comfy.sd

        options = {} if device is None else {"load_device": device}
        model = comfy.sd.load_diffusion_model(str(weight_file("wan_miniature_dit.safetensors")), model_options=options)
        model.get_model_object("model_sampling").set_parameters(shift=SHIFT, multiplier=1000)
        return model

    def few_steps(self, model, steps):
        """A clone with the LoRA distilled for so many steps, as Load LoRA loads it at strength 1; sampled without guidance."""
        import comfy.sd
        import comfy.utils

        file = weight_file(f"wan_miniature_{steps}_steps_lora.safetensors")
        return comfy.sd.load_lora_for_models(
            model, None, comfy.utils.load_torch_file(str(file), safe_load=True), 1.0, 0.0
        )[0]

    def module(self, name):
        """A module of this pack, as ComfyUI imports it, such as "nodes.settings.presets"."""
        return __import__(f"{self._pack}.{name}", fromlist=["*"])

    def router(self):
        """The miniature's trained router."""
        return self.module("sla2_kernels.weights").load_router(str(ROUTER))

    def patched(self, model, router, **settings):
        """A clone with SLA2's attention at every length; settings as in nodes.settings.AttentionSettings."""
        chosen = self.module("nodes.settings.values").AttentionSettings(**{"minimum_tokens": 0, **settings})
        return self.module("nodes.attention.patching").install(model, chosen, router)

    @torch.inference_mode()
    def sample(self, model, sigmas, sampler, caption, cfg, *, seed, latent):
        """Latents (1, 16, *latent), float64, of a caption (text) along the noise levels ``sigmas``."""
        import comfy.sample
        import comfy.samplers

        noise = torch.randn((1, 16, *latent), generator=torch.Generator().manual_seed(seed))
        chosen = comfy.samplers.sampler_object(sampler)
        positive, negative = ([[embed(text), {}]] for text in (caption, ""))
        options = {"disable_pbar": True, "seed": seed}
        latents = torch.zeros_like(noise)
        return comfy.sample.sample_custom(
            model, noise, cfg, chosen, sigmas, positive, negative, latents, **options
        ).double()

    def counts(self, model):
        """(sparse calls, dense calls, reasons of the dense ones) of the last run of a patched model."""
        layers = model.get_attachment("sla2").runs.finished()[-1].layers.values()
        reasons = sorted({reason for layer in layers for reason in layer.dense})
        return sum(layer.sparse for layer in layers), sum(layer.dense.total() for layer in layers), reasons
