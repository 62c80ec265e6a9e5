"""ComfyUI's own Wan 2.1 model classes with random weights, sampled by ComfyUI's own sampler."""

import importlib.util
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from .measure import is_gpu, use_device

PACK = Path(__file__).resolve().parents[1]
PACK_NAME = "sla2_pack"


@dataclass(frozen=True)
class WanSize:
    """Sizes of a Wan 2.1 text-to-video model."""

    dim: int
    ffn_dim: int
    heads: int
    layers: int


SIZES = {
    "1.3B": WanSize(1536, 8960, 12, 30),
    "14B": WanSize(5120, 13824, 40, 40),
    "tiny": WanSize(256, 512, 2, 2),
}
# latents (frames, height, width) of 81 frames; tiny: 9 frames of 128 x 192
LATENTS = {"480p": (21, 60, 104), "720p": (21, 90, 160), "tiny": (9, 16, 24)}


def import_comfyui(folder, device):
    """Makes ComfyUI importable from ``folder`` and starts it for ``device``, as its main.py would with no options."""
    sys.path.insert(0, str(folder))
    import comfy.options

    comfy.options.enable_args_parsing(False)
    from comfy.cli_args import args

    args.cpu = not is_gpu(device)
    use_device(device)
    import comfy.sample  # noqa: F401  the import that starts model management


def load_pack():
    """This pack as a package of its own name: its folder nodes/ must not shadow ComfyUI's module nodes."""
    if PACK_NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            PACK_NAME, PACK / "__init__.py", submodule_search_locations=[str(PACK)]
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules[PACK_NAME] = module
        spec.loader.exec_module(module)
    return sys.modules[PACK_NAME]


def make_model(size, device, dtype):
    """A ComfyUI ModelPatcher around a Wan 2.1 of ``size`` whose weights are small random numbers, made on ``device``."""
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.WAN21_T2V(
        {
            "image_model": "wan2.1", "model_type": "t2v", "dim": size.dim, "ffn_dim": size.ffn_dim,
            "num_heads": size.heads, "num_layers": size.layers, "patch_size": (1, 2, 2), "freq_dim": 256, "in_dim": 16,
            "out_dim": 16, "window_size": (-1, -1), "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6,
        }
    )  # fmt: skip
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, device=torch.device(device))
    generator = torch.Generator(device=device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.diffusion_model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return comfy.model_patcher.ModelPatcher(
        model, load_device=torch.device(device), offload_device=torch.device(device)
    )


def use_backend(model, name):
    """A clone of ``model`` whose attention is one of ComfyUI's registered backends."""
    from comfy.ldm.modules.attention import get_attention_function

    backend = get_attention_function(name)

    def override(func, *args, **kwargs):
        return backend(*args, **kwargs)

    patched = model.clone()
    patched.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = override
    return patched


def registered_backends():
    """Names of ComfyUI's attention backends that can be worth timing beside its default."""
    from comfy.ldm.modules.attention import REGISTERED_ATTENTION_FUNCTIONS

    return [name for name in REGISTERED_ATTENTION_FUNCTIONS if name not in ("sub_quad", "split", "pytorch")]


def default_backend():
    """Name of the function that ComfyUI chose for this machine."""
    from comfy.ldm.modules.attention import optimized_attention

    return optimized_attention.__name__


@torch.inference_mode()
def sample(model, latent, steps, on_step=None):
    """Euler steps without guidance (one model call per step); returns the latents and the seconds of each step.

    Steps are timed between the sampler's callbacks, with the GPU waited for; the first one also holds the set-up.
    """
    import comfy.model_management
    import comfy.sample
    import comfy.samplers

    device = comfy.model_management.get_torch_device()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((1, 16, *latent), generator=generator)
    context = 0.1 * torch.randn((1, 512, 4096), generator=generator)
    marks = [time.perf_counter()]

    def callback(step, denoised, x, total):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        marks.append(time.perf_counter())
        if on_step is not None:
            on_step(step)

    conditioning = [[context, {}]]
    out = comfy.sample.sample_custom(
        model, noise, 1.0, comfy.samplers.sampler_object("euler"), torch.linspace(1, 0.2, steps + 1), conditioning,
        conditioning, torch.zeros_like(noise), callback=callback, disable_pbar=True, seed=0,
    )  # fmt: skip
    return out, [b - a for a, b in zip(marks, marks[1:], strict=False)]
