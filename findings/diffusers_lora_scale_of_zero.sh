#!/usr/bin/env bash
# diffusers 0.42.1 and 0.35.2, peft 0.21.2: attention_kwargs={"scale": s} should hold for the call that it is given to. After one call
# with s = 0, meant to switch LoRA off for a step or for a comparison, every active LoRA stays at strength 1, whatever set_adapters()
# had set: from the next call on one at 0.5 acts twice as strongly, one at -1 the other way round, and one at 0 is on. Nothing is
# said. diffusers undoes a scale by dividing by it, and where it is 0 by calling set_scale(1) of peft, which starts at alpha / rank and
# knows nothing of set_adapters(). Any other s, 1e-12 too, gives back what was set, but for rounding. Call set_adapters()
# again after a scale of 0, or use disable_lora() and enable_lora() instead.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip "$@"; }
pip install -q torch==2.13.0 numpy==2.3.5
pip install -q diffusers==0.42.1 peft==0.21.2 transformers==5.24.0 accelerate==1.15.0 ftfy==6.3.1
cat > "$folder/scale.py" <<'PY'
import importlib.metadata
import io
import logging
import warnings

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

print("diffusers", importlib.metadata.version("diffusers"), "peft", importlib.metadata.version("peft"))
torch.manual_seed(0)
transformer = WanTransformer3DModel(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8,
    freq_dim=16, ffn_dim=16, num_layers=1, rope_max_seq_len=32,
)
for weight in transformer.parameters():
    torch.nn.init.normal_(weight, std=0.1)
pipe = WanPipeline(None, None, None, UniPCMultistepScheduler(), transformer=transformer)
inputs = {
    "hidden_states": torch.randn(1, 4, 1, 4, 4), "timestep": torch.tensor([500]),
    "encoder_hidden_states": torch.randn(1, 3, 8), "return_dict": False,
}
layer = "transformer.blocks.0.ffn.net.2"
pipe.load_lora_weights({f"{layer}.lora_A.weight": torch.randn(2, 16), f"{layer}.lora_B.weight": torch.randn(24, 2)}, "style")


@torch.no_grad()
def output(scale=None):
    return pipe.transformer(**inputs, attention_kwargs={} if scale is None else {"scale": scale})[0]


heard = io.StringIO()
logging.getLogger("diffusers").addHandler(logging.StreamHandler(heard))
pipe.set_adapters("style", 1.0)
full = output()
pipe.disable_lora()
without = output()
pipe.enable_lora()
with warnings.catch_warnings():
    warnings.simplefilter("error")
    for strength in (0.5, -1.0, 0.0):
        for scale in (0.7, 1e-12, 0.0):
            pipe.set_adapters("style", strength)
            before = output()
            during = output(scale)
            after = output()
            if scale == 0:
                assert torch.equal(during, without), "a scale of 0 does not switch the LoRA off"
            kept, reset = torch.allclose(after, before, atol=1e-5), torch.equal(after, full)
            result = "as before" if kept else "strength 1" if reset else "another strength"
            print(f"set_adapters {strength:4}, a call with scale {scale}, then a call without: {result}")
            assert not torch.allclose(before, full, atol=1e-3)
            assert result == ("strength 1" if scale == 0 else "as before"), "the strength is kept otherwise now"
            assert pipe.get_active_adapters() == ["style"]
pipe.set_adapters("style", 0.5)
before = output()
pipe.disable_lora()
assert torch.equal(output(), without)
pipe.enable_lora()
assert torch.equal(output(), before)
print("disable_lora() and enable_lora(): as before")
assert not heard.getvalue(), f"diffusers says: {heard.getvalue()}"
print("as seen before: a scale of 0 leaves every active LoRA at strength 1")
PY
check() {
  "$folder/venv/bin/python" "$folder/scale.py" 2> "$folder/said" || { cat "$folder/said"; echo "diffusers $1 no longer undoes a scale as described"; exit 1; }
}
check 0.42.1
pip install -q --no-deps diffusers==0.35.2
check 0.35.2
