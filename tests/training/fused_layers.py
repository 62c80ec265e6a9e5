"""A LoRA on a linear layer that takes ComfyUI 0.39's keywords, and the gradients of a block that overwrites its input. Prints
one line of JSON for test_lora_on_fused_layers.py:

python fused_layers.py REPOSITORY
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(sys.argv[1]) / "tests" / "comfyui"))

import comfy.ops
from comfy.weight_adapter import adapter_maps
from model_host import pack_loader

pack_module = pack_loader(Path(sys.argv[1]))
SWISH = {"swish": torch.nn.functional.silu}


def fused(x, *, input_act=None, residual=None, residual_scale=None):
    """The layer in one piece, as ComfyUI 0.39 computes it."""
    out = linear(x if input_act is None else SWISH[input_act](x))
    return out if residual is None else residual + residual_scale * out


torch.manual_seed(0)
linear = torch.nn.Linear(8, 6)
lora = adapter_maps["LoRA"].create_train(torch.empty(6, 8), rank=2, alpha=1.0)
for part in (lora.lora_up, lora.lora_down):  # one of them starts at zero
    torch.nn.init.normal_(part.weight)
adapter = pack_module("nodes.training.lora_adapters").SwitchedLora(lora)
comfy.ops.INPUT_ACT_EAGER = SWISH
x, residual, scale = torch.randn(3, 8), torch.randn(3, 6), torch.randn(6)
asked = {"input_act": "swish", "residual": residual, "residual_scale": scale}

weight = lora.lora_up.weight @ lora.lora_down.weight / 2  # alpha / rank
inner = SWISH["swish"](x)
wanted = residual + scale * (linear(inner) + inner @ weight.T)
found = {"with": (adapter.bypass_forward(fused, x, **asked) - wanted).abs().max().item()}
found["plain"] = (adapter.bypass_forward(fused, x) - linear(x) - x @ weight.T).abs().max().item()
adapter.on = False
found["off"] = bool(torch.equal(adapter.bypass_forward(fused, x, **asked), fused(x, **asked)))
adapter.on = True
try:
    adapter.bypass_forward(fused, x, input_act="mish")
except ValueError as error:
    found["unknown"] = str(error)


class Overwriting(torch.nn.Linear):
    def forward(self, x):
        x += super().forward(torch.nn.functional.rms_norm(x, (8,)))
        return x


block = Overwriting(8, 8)
training = pack_module("nodes.training.lora_training")
training.patch(block)
for name, loss in (("overwritten", block(torch.randn(1, 3, 8)).sum()), ("other", torch.zeros(1).sum())):
    try:
        training.backward(loss, block)
    except (ValueError, RuntimeError) as error:
        found[name] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
