"""LoRA adapters of ComfyUI's own kind on the linear layers of a model's blocks. Needs ComfyUI 0.25 or newer."""

import comfy.ops
import torch
from comfy.weight_adapter import adapter_maps
from comfy.weight_adapter.base import WeightAdapterTrainBase
from comfy.weight_adapter.bypass import BypassInjectionManager

PARTS = ("lora_up", "lora_down")


class SwitchedLora(WeightAdapterTrainBase):
    """One layer's LoRA, added to the output of weights of any kind; ``on`` switches it."""

    def __init__(self, lora):
        super().__init__()
        self.lora, self.on = lora, True

    def bypass_forward(self, org_forward, x, *args, input_act=None, residual=None, residual_scale=None, **kwargs):
        """Keywords of ComfyUI 0.39's linear layers: residual + residual_scale * layer(input_act(x)) in one kernel."""
        if not self.on:
            fused = {"input_act": input_act, "residual": residual, "residual_scale": residual_scale}
            given = {name: value for name, value in fused.items() if value is not None}
            return org_forward(x, *args, **given, **kwargs)
        x = x if input_act is None else activation(input_act)(x)
        out = org_forward(x, *args, **kwargs)
        with torch.autocast(x.device.type, x.dtype, enabled=x.dtype != torch.float32):
            out = out + self.lora.h(x, out)
        if residual is None:
            return out
        return residual + (out if residual_scale is None else residual_scale * out)


def activation(name):
    """ComfyUI's function of this name, which its linear layers apply to their input."""
    known = getattr(comfy.ops, "INPUT_ACT_EAGER", {})
    if name not in known:
        raise ValueError(
            f"SLA2 Train LoRA cannot train this model here: one of its layers asks for the activation {name}, "
            "which this ComfyUI does not offer by name. Train on another ComfyUI release, and report this one."
        )
    return known[name]


class LoraAdapters:
    """Adapters by module name ("diffusion_model.blocks.0.self_attn.q"), float32.

    model: ComfyUI's BaseModel. blocks: paths of its blocks inside the diffusion model. seed: of their first values.
    """

    def __init__(self, model, blocks, rank, seed):
        self.rank, self.adapters = rank, {}
        self._manager = BypassInjectionManager()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for block in blocks:
                for name, module in model.diffusion_model.get_submodule(block).named_modules():
                    if hasattr(module, "weight_function") and hasattr(module, "in_features"):
                        self._add(f"diffusion_model.{block}.{name}", module)

    def _add(self, name, module):
        # only the shape is used, and a quantised weight may be stored in another one
        shape = torch.empty(1).expand(module.out_features, module.in_features)
        # alpha 1 as in core's Train LoRA, so that a learning rate means the same there and here
        adapter = SwitchedLora(adapter_maps["LoRA"].create_train(shape, rank=self.rank, alpha=1.0))
        self.adapters[name] = adapter
        self._manager.add_adapter(name, adapter)

    def injections(self, model):
        """ComfyUI's PatcherInjections that put the adapters into ``model``, and take them out again."""
        return self._manager.create_injections(model)

    def switch(self, on):
        for adapter in self.adapters.values():
            adapter.on = on

    def parameters(self):
        return [getattr(a.lora, part).weight for a in self.adapters.values() for part in PARTS]

    def state(self):
        """ComfyUI's LORA_MODEL: {"diffusion_model.blocks.0.self_attn.q.lora_up.weight": ...} on the CPU, 16 bit."""
        state = {}
        for name, adapter in self.adapters.items():
            for part in PARTS:
                weight = getattr(adapter.lora, part).weight
                state[f"{name}.{part}.weight"] = weight.detach().to("cpu", torch.bfloat16, copy=True)
            state[f"{name}.alpha"] = adapter.lora.alpha.detach().to("cpu", torch.float32, copy=True)
        return state

    @torch.no_grad()
    def load(self, state, source):
        """Goes on from a LoRA for the same layers. Raises ValueError naming the first tensor that does not fit."""
        wanted = {f"{n}.{p}.weight": getattr(a.lora, p).weight for n, a in self.adapters.items() for p in PARTS}
        known = wanted.keys() | {f"{name}.alpha" for name in self.adapters}
        for key in [*wanted, *(key for key in state if key not in known)]:
            want = f"shape {tuple(wanted[key].shape)} (rank {self.rank})" if key in wanted else "no such tensor"
            have = f"shape {tuple(state[key].shape)}" if key in state else "no such tensor"
            if key not in wanted or key not in state or state[key].shape != wanted[key].shape:
                raise ValueError(
                    f"SLA2 Train LoRA cannot go on from {source}: at {key} the file has {have}, and this training {want}."
                )
            wanted[key].copy_(state[key])
        for name, adapter in self.adapters.items():
            # a file without alpha: its matrices are used unscaled
            adapter.lora.alpha.fill_(float(state.get(f"{name}.alpha", self.rank)))
