"""The classes that people run, at their real sizes and with random weights: MiniMax H3, LTX-2, Wan 2.2.

A case is a class of ComfyUI, its arguments, and the inputs of one model call. Distilled models make one such call a step.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

WEIGHTS = ("16bit", "int8", "fp8")
LEAST_8BIT = 1024  # features on both sides of a linear layer whose weight is 8 bit, as in the published files
ROTATED = 256  # features that are rotated together
# weights: (ComfyUI's name of the format, its layout, arguments of the conversion)
FORMATS = {
    "int8": ("int8_tensorwise", "TensorWiseINT8Layout", {"per_channel": True, "convrot": True}),
    "fp8": ("float8_e4m3fn", "TensorCoreFP8E4M3Layout", {"scale": "recalculate"}),
}


@dataclass(frozen=True)
class Case:
    """inputs(rand): keyword arguments of a model call, where rand(*shape) makes numbers on the device.

    tokens: of the video, in its self-attention. prefix: (text, sound) tokens before it in the same sequence.
    """

    cls: str
    arguments: dict
    layers: int  # of the real model
    heads: int
    tokens: int
    inputs: Callable
    prefix: tuple = (0, 0)


def wan(latents, dim=5120, ffn_dim=13824, heads=40, layers=40):
    """Wan 2.1 and 2.2 text to video: latents (frames, height, width), a token is 1 x 2 x 2 of them."""
    frames, height, width = latents
    sizes = {"dim": dim, "ffn_dim": ffn_dim, "num_heads": heads, "num_layers": layers}

    def inputs(rand):
        context = 0.1 * rand(1, 512, 4096)
        return {"x": rand(1, 16, *latents), "timestep": torch.tensor([500.0]), "context": context}

    return Case("comfy.ldm.wan.model.WanModel", sizes, layers, heads, frames * height * width // 4, inputs)


def ltx2(frames, height, width, sound=126, layers=48, heads=32, width_of_text=3840):
    """LTX-2: sound in the same model, a token per latent cell. The connectors that make the text are no part of a call."""
    sizes = {"num_layers": layers, "in_channels": 128, "audio_in_channels": 128, "caption_channels": width_of_text}
    sizes |= {"num_attention_heads": heads, "cross_attention_dim": 128 * heads, "connector_num_attention_heads": 1}
    sizes |= {"audio_num_attention_heads": heads, "audio_cross_attention_dim": 64 * heads}

    def inputs(rand):
        latents = [rand(1, 128, frames, height, width), rand(1, 8, sound, 16)]
        text = {"context": 0.1 * rand(1, 1024, 2 * width_of_text), "attention_mask": None, "frame_rate": 25}
        return {"x": latents, "timestep": torch.tensor([0.5]), **text}

    return Case("comfy.ldm.lightricks.av_model.LTXAVModel", sizes, layers, heads, frames * height * width, inputs)


def h3(frames, height, width, text, sound, layers=50, **smaller):
    """MiniMax H3 as its pruned files are: the modulation comes from a table of 1,024 times with 32 numbers each."""
    sizes = {"num_layers": layers, "adaln_curve_grid": 1024, "time_embed_dim": 32, **smaller}
    hidden = smaller.get("hidden_size", 5376)

    def inputs(rand):
        latents = [rand(1, 24, frames, height, width), rand(1, 32, 2, sound)]
        return {"x": latents, "timestep": torch.tensor([500.0]), "context": 0.1 * rand(1, text, hidden)}

    tokens, heads = frames * height * width // 4, smaller.get("num_attention_heads", 56)
    cls = "comfy.ldm.minimax.model.MiniMaxH3Model"
    return Case(cls, sizes, layers, heads, tokens, inputs, (text, 2 * sound))


TINY_H3 = {"hidden_size": 256, "num_attention_heads": 2, "ffn_hidden_size": 512}
CASES = {
    # 1344 x 768, 124 frames: 41,328 video tokens behind 240 of text and 432 of sound, 42,000 in all
    "MiniMax H3": h3(41, 48, 84, text=240, sound=216),
    # 1280 x 704, 121 frames: 14,080 tokens
    "LTX-2, second stage": ltx2(16, 22, 40),
    # 1280 x 720, 81 frames: 75,600 tokens; its two models are alike
    "Wan 2.2 14B, 720p": wan((21, 90, 160)),
    "tiny H3": h3(4, 16, 20, text=24, sound=9, layers=2, **TINY_H3),
    "tiny LTX-2": ltx2(4, 8, 10, sound=12, layers=2, heads=2, width_of_text=64),
    "tiny Wan": wan((4, 16, 20), dim=256, ffn_dim=512, heads=2, layers=2),
}


def crossover_cases(lengths, layers=8):
    """{name: Case} of a few layers at short lengths: with the heads of LTX-2 and of Wan 2.1 1.3B. Lengths: multiples of 256."""
    found = {}
    for tokens in lengths:
        found[f"LTX-2, {tokens} tokens"] = ltx2(tokens // 256, 16, 16, layers=layers)
        sizes = {"dim": 1536, "ffn_dim": 8960, "heads": 12, "layers": layers}
        found[f"Wan 2.1 1.3B, {tokens} tokens"] = wan((tokens // 256, 32, 32), **sizes)
    return found


class Host(torch.nn.Module):
    """What ComfyUI's BaseModel is to a diffusion model: its owner, and the place of the wrappers around a model call."""

    def __init__(self, diffusion_model):
        super().__init__()
        self.diffusion_model = diffusion_model
        self.model_sampling = Sampling()

    def apply_model(self, inputs, options):
        from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers

        wrappers = get_all_wrappers(WrappersMP.APPLY_MODEL, options)
        rest = {name: value for name, value in inputs.items() if name != "x"}
        executor = WrapperExecutor.new_class_executor(self._apply_model, self, wrappers)
        return executor.execute(inputs["x"], transformer_options=options, **rest)

    def _apply_model(self, x, transformer_options, **inputs):
        return self.diffusion_model(x, transformer_options=transformer_options.copy(), **inputs)


class Sampling(torch.nn.Module):
    def percent_to_sigma(self, percent):
        return 1.0 - percent


def make_patcher(case, device, dtype, *, weights="16bit", layers=None):
    """A ComfyUI ModelPatcher around the case's class with random weights, made on ``device``.

    weights: one of WEIGHTS, of the large linear layers in the blocks: "int8" as in files named int8_convrot, "fp8" as in
    those named fp8_scaled. layers: how many blocks, all of them where None.
    """
    import comfy.model_patcher
    import comfy.ops

    operations = comfy.ops.mixed_precision_ops({}, dtype) if weights in FORMATS else comfy.ops.disable_weight_init
    module, _, name = case.cls.rpartition(".")
    sizes = case.arguments | {"num_layers": layers or case.layers}
    made = {"device": torch.device(device), "dtype": dtype, "operations": operations}
    model = getattr(importlib.import_module(module), name)(**sizes, **made).eval().requires_grad_(False)
    fill(model, torch.Generator(device=device).manual_seed(0), dtype, FORMATS.get(weights))
    return comfy.model_patcher.ModelPatcher(Host(model), torch.device(device), torch.device(device))


@torch.no_grad()
def fill(model, generator, dtype, weight_format=None):
    """Random weights, tensor by tensor, so that no more than one is there in both formats. weight_format: of FORMATS."""
    for name, module in model.named_modules():
        if hasattr(module, "factory_kwargs"):  # a linear layer that can hold quantised weights, and has none yet
            fill_quantised(module, name, generator, dtype, weight_format)
        for own, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if not tensor.is_floating_point() or own == "weight" and hasattr(module, "factory_kwargs"):
                continue
            if own == "inv_freq":
                tensor.copy_(10000.0 ** -torch.linspace(0, 1, tensor.numel()))
            elif tensor.dim() > 1:
                # some classes leave buffers on the CPU
                numbers = torch.empty(tensor.shape, device=generator.device, dtype=tensor.dtype)
                tensor.copy_(numbers.normal_(0, 0.02, generator=generator))
            else:
                tensor.fill_(0.0 if own == "bias" else 1.0)


def fill_quantised(linear, name, generator, dtype, weight_format):
    from comfy.quant_ops import QuantizedTensor

    size = (linear.out_features, linear.in_features)
    weight = torch.empty(size, device=generator.device, dtype=dtype).normal_(0, 0.02, generator=generator)
    if "blocks." in name and min(size) >= LEAST_8BIT and size[1] % ROTATED == 0:
        linear.quant_format, linear.layout_type, conversion = weight_format
        weight = QuantizedTensor.from_float(weight, linear.layout_type, **conversion)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)


def make_inputs(case, device, dtype):
    """The case's inputs; numbers are of ``dtype``, but for the timestep."""
    generator = torch.Generator(device=device).manual_seed(1)
    inputs = case.inputs(lambda *shape: torch.randn(shape, generator=generator, device=device).to(dtype))
    return inputs | {"timestep": inputs["timestep"].to(device)}


@torch.inference_mode()
def call(patcher, inputs):
    """One model call, as a sampler makes it: the patcher's callbacks first, its wrappers and options in the call."""
    options = dict(patcher.model_options["transformer_options"])
    for callback in patcher.get_all_callbacks("on_prepare_state"):
        callback(patcher, None, {"transformer_options": options})
    options |= {"wrappers": patcher.wrappers, "callbacks": patcher.callbacks}
    options |= {"sigmas": torch.tensor([0.5]), "sample_sigmas": torch.tensor([1.0, 0.5, 0.25, 0.0])}
    # a model may change what it is handed
    latents = inputs["x"]
    latents = [x.clone() for x in latents] if isinstance(latents, list) else latents.clone()
    return patcher.model.apply_model(inputs | {"x": latents}, options)
