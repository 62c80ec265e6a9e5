#!/usr/bin/env bash
# diffusers 0.42.1, WanPipeline.load_lora_weights: LoRA files for Wan in the layout of ComfyUI may hold whole differences
# (`.diff`) beside low-rank pairs, as those of distilled few-step models do for norms, the patch embedding and modulations.
# diffusers loads such a file without error or warning and leaves them out: the output does not change at all. Of a norm's
# `.diff` it says so at level debug alone, as "just zeroed values", whatever is in it; of the others at level info.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip "$@"; }
pip install -q torch==2.13.0 numpy==2.3.5
pip install -q diffusers==0.42.1 peft==0.21.2 transformers==5.24.0 accelerate==1.15.0 ftfy==6.3.1
cat > "$folder/differences.py" <<'PY'
import io
import logging

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

heard = io.StringIO()
logging.getLogger("diffusers").addHandler(logging.StreamHandler(heard))
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


@torch.no_grad()
def change(lora):
    """Relative change of the model's output by this LoRA."""
    before = pipe.transformer(**inputs)[0]
    pipe.load_lora_weights({f"diffusion_model.{name}": value for name, value in lora.items()})
    after = pipe.transformer(**inputs)[0]
    pipe.unload_lora_weights()
    return float((after - before).norm() / before.norm())


q = "blocks.0.self_attn.q"
zero_pair = {f"{q}.lora_A.weight": torch.randn(2, 24), f"{q}.lora_B.weight": torch.zeros(24, 2)}
pair = change(zero_pair | {f"{q}.lora_B.weight": torch.randn(24, 2)})
print(f"a low-rank pair changes the output by {pair:.3g}")
assert pair > 1e-4
differences = {
    "blocks.0.self_attn.norm_q.diff": (24,), "blocks.0.norm3.diff_b": (24,), "patch_embedding.diff": (24, 4, 1, 2, 2),
    "blocks.0.modulation.diff": (1, 6, 24), "blocks.0.self_attn.q.diff": (24, 24),
}
for name, shape in differences.items():
    found = change(zero_pair | {name: torch.full(shape, 5.0)})
    print(f"{name} of 5 everywhere: {found:.3g}")
    assert found == 0, f"{name} is applied now"
assert not [line for line in heard.getvalue().splitlines() if "diff" in line], f"diffusers says: {heard.getvalue()}"
print("as seen before: whole differences are left out, and nothing is said")
PY
"$folder/venv/bin/python" "$folder/differences.py" 2> "$folder/said" || { cat "$folder/said"; echo "diffusers no longer reads these files as described"; exit 1; }
