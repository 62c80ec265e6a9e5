"""How ComfyUI 0.35's Model Sparse Attention behaves on a MODEL, with a stand-in for its kernel that counts its calls.

It takes every self-attention call that it meets, puts its override on top again before each step, and on MiniMax H3 it
stands in for the attention of whole blocks.
"""

import torch
from comfy.patcher_extension import CallbacksMP

KEY, OVERRIDE = "block_sparse_attention", "optimized_attention_override"


class CoreSparse:
    """One such node: place(model) is a clone of a MODEL with it; calls: how often its kernel ran."""

    def __init__(self):
        self.calls = 0
        self.made = []

    def place(self, model):
        placed, state = model.clone(), self
        state.on_top(placed.model_options["transformer_options"])
        placed.add_callback_with_key(
            CallbacksMP.ON_PREPARE_STATE,
            KEY,
            lambda patcher, timestep, options: state.on_top(options["transformer_options"]),
        )
        placed.add_callback_with_key(CallbacksMP.ON_CLEANUP, KEY, lambda patcher: state.made.clear())
        diffusion_model = model.model.diffusion_model
        if type(diffusion_model).__name__ == "MiniMaxH3Model":
            for index, block in enumerate(diffusion_model.blocks):
                placed.set_model_patch_replace(block_patch(self, block), "dit", "double_block", index)
        return placed

    def on_top(self, options):
        current = options.get(OVERRIDE)
        if current not in self.made:
            options[OVERRIDE] = override_of(self, current)
            self.made.append(options[OVERRIDE])

    def kernel(self, func, *args, **kwargs):
        self.calls += 1
        return func(*args, **kwargs)


def override_of(state, previous):
    def override(func, q, k, v, heads, **kwargs):
        if q.shape == k.shape:
            return state.kernel(func, q, k, v, heads, **kwargs)
        return func(q, k, v, heads, **kwargs) if previous is None else previous(func, q, k, v, heads, **kwargs)

    return override


def block_patch(state, block, previous=None):
    def patch(args, extra):
        state.calls += 1
        attention = block.attn
        block._modules["attn"] = PastOverrides(attention)
        try:
            return extra["original_block"](args) if previous is None else previous(args, extra)
        finally:
            block._modules["attn"] = attention

    return patch


class PastOverrides(torch.nn.Module):
    """An attention of its own: no override and no hook of the module's sees it."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x, rope_freqs=None, transformer_options=None):
        return type(self.attention).forward(self.attention, x, rope_freqs=rope_freqs)
