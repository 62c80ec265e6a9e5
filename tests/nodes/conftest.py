"""A hook without ComfyUI, driven exactly as ComfyUI's wrap_attn drives an override."""

import functools
from types import SimpleNamespace

import pytest
import torch

HEADS, DIM, LAYERS = 2, 64, 4


def dense_attention(
    q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs
):
    """ComfyUI's attention_pytorch in short."""
    if not skip_reshape:
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    if kwargs.get("enable_gqa"):
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    if mask is not None:
        mask = mask[(None,) * (mask.dim() == 2)]
        mask = mask[:, None] if mask.dim() == 3 else mask
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=kwargs.get("scale"))
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def wrapped(func):
    """The contract of comfy.ldm.modules.attention.wrap_attn: the override comes first, the inner call is marked."""

    @functools.wraps(func)
    def wrapper(*args, **kwargs):
        if "_inside_attn_wrapper" in kwargs:
            return func(*args, **kwargs)
        options = kwargs.get("transformer_options")
        kwargs = kwargs | {"_inside_attn_wrapper": True}
        if options is not None and "optimized_attention_override" in options:
            return options["optimized_attention_override"](func, *args, **kwargs)
        return func(*args, **kwargs)

    return wrapper


class Sampling:
    """Flow sigmas: percent 0 is sigma 1."""

    sigma_max = 1.0

    @staticmethod
    def percent_to_sigma(percent):
        return 1.0 - percent


class Bench:
    """One hook and the calls of one model call."""

    def __init__(
        self,
        pack_module,
        router=None,
        grid=(3, 10, 10),
        front=0,
        by_frame=False,
        references=(),
        text_mask=True,
        sla_weights=None,
        **settings,
    ):
        self._pack_module = pack_module
        self.hook_module = pack_module("nodes.attention.hook")
        families, make = (
            pack_module("nodes.attention.model_families"),
            pack_module("nodes.settings.values").AttentionSettings,
        )
        layout = SimpleNamespace(
            grid=lambda inputs, patch: grid,
            prefix=lambda model, inputs, patch: front,
            by_frame=by_frame,
            references=lambda inputs: lambda front, video, tokens: references,
            text_mask=text_mask,
            family="wan",
            token_order="raster",
        )
        facts = families.ModelFacts(layout, LAYERS, HEADS, DIM, (1, 2, 2), ())
        settings = make(**{"sparsity": 0.5, "precision": "16bit", "minimum_tokens": 0} | settings)
        self.hook = self.hook_module.AttentionHook(settings, router, facts, None, Sampling(), sla_weights)
        self.override = self.override_over(None)
        self.attention = wrapped(dense_attention)
        self.options = {}

    def model_call(self, sigma=0.5, override=None, **options):
        self.options = {"sigmas": torch.tensor([sigma]), "optimized_attention_override": override or self.override}
        self.options |= options
        return self.hook.model_call(SimpleNamespace(), dict, self.options)

    def attend(self, *args, layer=0, **kwargs):
        options = self.options if layer is None else self.options | {self.hook_module.LAYER: layer}
        return self.attention(*args, **kwargs, transformer_options=options)

    def override_over(self, base):
        return self._pack_module("nodes.attention.override").make_override(self.hook, base)

    @property
    def run(self):
        return self.hook.run_for_call()

    def report_text(self, run):
        return self._pack_module("nodes.runs.report_text").report_text(self.hook, run)


@pytest.fixture
def bench(pack_module):
    return functools.partial(Bench, pack_module)


@pytest.fixture
def qkv():
    """q, k, v of (B, L, H * D), as Wan hands them over."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 300, HEADS * DIM, generator=generator) for _ in range(3)]
