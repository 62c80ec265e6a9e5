"""What ComfyUI's BaseModel, its sampler and a pack's loading are to a diffusion model, for probes without a server.

Import it once ComfyUI is on the path.
"""

import importlib
import importlib.util
import sys

import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers


def pack_loader(root):
    """pack_module("nodes.settings.values") is that module of the pack at ``root``."""
    spec = importlib.util.spec_from_file_location(
        "sla2_pack", root / "__init__.py", submodule_search_locations=[str(root)]
    )
    sys.modules["sla2_pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["sla2_pack"])
    return lambda name: importlib.import_module(f"sla2_pack.{name}")


class Sampling(torch.nn.Module):
    def percent_to_sigma(self, percent):
        return 1.0 - percent


class Host(torch.nn.Module):
    """What ComfyUI's BaseModel is to a diffusion model: its owner, and the place of the APPLY_MODEL wrappers."""

    def __init__(self, diffusion_model):
        super().__init__()
        self.diffusion_model = diffusion_model
        self.model_sampling = Sampling()

    def apply_model(self, inputs, transformer_options):
        wrappers = get_all_wrappers(WrappersMP.APPLY_MODEL, transformer_options)
        x = inputs["x"]
        rest = {name: value for name, value in inputs.items() if name != "x"}
        executor = WrapperExecutor.new_class_executor(self._apply_model, self, wrappers)
        return executor.execute(x, transformer_options=transformer_options, **rest)

    def _apply_model(self, x, transformer_options, **inputs):
        out = self.diffusion_model(x, transformer_options=transformer_options.copy(), **inputs)
        return torch.cat([part.flatten() for part in out]) if isinstance(out, (list, tuple)) else out


def fresh(value):
    if isinstance(value, torch.Tensor):
        return value.clone()
    return [fresh(item) for item in value] if isinstance(value, list) else value


@torch.inference_mode()
def sample(patcher, inputs, sigma=0.5):
    """One model call, as a sampler makes it: the patcher's callbacks first, its wrappers and options in the call."""
    patcher.patch_model()
    options = dict(patcher.model_options["transformer_options"])
    for callback in patcher.get_all_callbacks("on_prepare_state"):
        callback(patcher, None, {"transformer_options": options})
    options |= {
        "wrappers": patcher.wrappers,
        "callbacks": patcher.callbacks,
        "sigmas": torch.tensor([sigma]),
        "sample_sigmas": torch.tensor([1.0, 0.5, 0.25, 0.0]),
    }
    try:
        return patcher.model.apply_model({name: fresh(value) for name, value in inputs.items()}, options)
    finally:
        patcher.unpatch_model()
