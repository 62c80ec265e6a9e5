#!/usr/bin/env bash
# diffusers 0.42.1, torch 2.13.0: skipping the attention of some layers, as skip-layer and perturbed-attention guidance do
# (LayerSkipConfig with skip_attention or skip_attention_scores), raises "Model class ... WanAttnProcessor not registered" on a Wan
# transformer fresh from diffusers. The registry of attention processors knows Wan by WanAttnProcessor2_0 alone, the deprecated
# name, whose constructor returns a WanAttnProcessor, so that no model ever has one. Skipping feed-forward layers or whole blocks
# works. Registering WanAttnProcessor under the old entry makes the attention's skip run.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip "$@"; }
pip install -q torch==2.13.0 numpy==2.3.5 diffusers==0.42.1
cat > "$folder/skip.py" <<'PY'
import torch
from diffusers import WanTransformer3DModel
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanAttnProcessor2_0


def outcome(attention, scores, feed_forward):
    """Relative change of a tiny model's output where layer 1 skips these parts, or the error's sentence."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 32, "text_dim": 32, "freq_dim": 32, "ffn_dim": 64, "num_layers": 3}
    model = WanTransformer3DModel(**sizes).eval()
    inputs = {"hidden_states": torch.randn(1, 16, 3, 8, 8), "timestep": torch.tensor([500])}
    inputs |= {"encoder_hidden_states": torch.randn(1, 6, 32), "return_dict": False}
    plain = model(**inputs)[0]
    parts = {"skip_attention": attention, "skip_attention_scores": scores, "skip_ff": feed_forward}
    try:
        apply_layer_skip(model, LayerSkipConfig(indices=[1], fqn="blocks", **parts))
        out = model(**inputs)[0]
    except ValueError as error:
        return str(error)
    return float((out - plain).norm() / plain.norm())


with torch.no_grad():
    for name, parts in {"feed-forward": (0, 0, 1), "whole blocks": (1, 0, 1)}.items():
        change = outcome(*map(bool, parts))
        print(f"skip {name}: the output changes by {change:.3f}")
        assert change > 1e-3
    for name, parts in {"attention": (1, 0, 0), "attention scores": (0, 1, 0)}.items():
        error = outcome(*map(bool, parts))
        print(f"skip {name}: ValueError: {error}")
        assert isinstance(error, str) and "WanAttnProcessor'> not registered" in error, "it works now"
    assert type(WanAttnProcessor2_0()) is WanAttnProcessor
    AttentionProcessorRegistry.register(WanAttnProcessor, AttentionProcessorRegistry.get(WanAttnProcessor2_0))
    change = outcome(True, False, False)
    print(f"skip attention, with the processor registered under its new name: the output changes by {change:.3f}")
    assert change > 1e-3
print("as seen before: Wan's attention cannot be skipped")
PY
"$folder/venv/bin/python" -W ignore "$folder/skip.py" || { echo "diffusers no longer skips Wan's attention as described"; exit 1; }
